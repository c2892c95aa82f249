"""Devices as data: hardware facts, and what a kernel stack makes of them, each value with its kind and source.

A device file (`devices/NAME.json`, or any path) has `name`, `description`, `stack`, `hardware` and, in the same file or
in `constants/NAME.STACK.json`, `constants`, and perhaps measurements: `tables` (`tables.py`), `steps`
(`step_tables.py`). Every entry is `{"value", "kind", "source"}` (`sourced.py`). Efficiencies are shares of the vendor's
peak; 1 GB/s is 1e9 bytes/s in one direction, 1 GiB is 2**30 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import extension
from engine.costmodel.sourced import Provenance, check_ranges, provenance_table, read_object, read_sourced, read_text
from engine.costmodel.step_tables import StepTables
from engine.errors import ConfigError

HERE = Path(__file__).parent
INTERCONNECTS = ("none", "memory", "pcie", "nvlink", "ici")  # pcie: all-reduces cross the host link


@dataclass(frozen=True)
class Hardware:
    """What the vendor says of a device, and what can be had of it."""

    bf16_tflops: float  # dense; of float16 too
    memory_gib: float  # that a program sees
    memory_gbs: float
    link_gbs_spec: float  # host link
    link_gbs: float  # what large copies reach of it
    link_latency_us: float  # before a copy moves its first byte
    reserved_gib: float  # taken by the driver's context, the runtime and captured graphs
    interconnect: str  # of INTERCONNECTS
    interconnect_gbs: float | None = None
    fp32_tflops: float | None = None  # of the general cores, without TF32

    def __post_init__(self):
        rates = ("bf16_tflops", "fp32_tflops", "memory_gbs", "link_gbs_spec", "link_gbs", "interconnect_gbs")
        check_ranges(self, positive=("memory_gib", *rates))
        if self.interconnect not in INTERCONNECTS:
            raise ConfigError(f"interconnect {self.interconnect!r} is unknown; known: {', '.join(INTERCONNECTS)}")


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What one kernel stack makes of a device."""

    eff_gemm: float  # of the peak
    eff_gemm_bw: float  # of memory_gbs
    t0_gemm_us: float  # per product
    eff_attn_prefill: float  # of the peak, the causal half counted once
    edge_prefill_tokens: float = 0.0  # keys that a query costs beyond those it attends to
    eff_attn_decode_bw: float
    edge_decode_tokens: float = 0.0  # tokens that a row costs beyond those it attends to
    t0_attn_us: float  # with the KV write
    skew_alpha: float = 0.0  # decode rows of unequal length: t(mean) + alpha (t(longest) - t(mean))
    mixed_decode: float = 1.0  # decode attention in a step that also prefills, relative to one that does not
    eff_elementwise_bw: float  # above 1 where activations stay in the last cache
    t0_elementwise_us: float
    allreduce_busbw_gbs: dict[str, float] | None = None  # by number of devices; None: one device only
    t0_allreduce_us: dict[str, float] | None = None
    t0_host_us: float  # per step: what is not hidden behind the device

    def __post_init__(self):
        shares = ("eff_gemm", "eff_gemm_bw", "eff_attn_prefill", "eff_attn_decode_bw")
        check_ranges(self, positive=("eff_elementwise_bw", "mixed_decode"), shares=shares)
        if self.skew_alpha > 1:
            raise ConfigError(f"skew_alpha must be <= 1, got {self.skew_alpha}")
        bandwidth, launch = self.allreduce_busbw_gbs or {}, self.t0_allreduce_us or {}
        for name, entries in (("allreduce_busbw_gbs", bandwidth), ("t0_allreduce_us", launch)):
            bad = [
                f"{n}: {v!r}"
                for n, v in entries.items()
                if not n.isdecimal() or not isinstance(v, int | float) or v <= 0
            ]
            if bad:
                raise ConfigError(f"{name} must be numbers > 0 by number of devices, got {', '.join(bad)}")
        if set(bandwidth) != set(launch):
            raise ConfigError("allreduce_busbw_gbs and t0_allreduce_us must know the same numbers of devices")


@dataclass(frozen=True)
class DeviceProfile:
    """A device under one kernel stack."""

    name: str
    description: str
    stack: str
    hardware: Hardware
    constants: Constants
    provenance: dict[str, Provenance]  # of every value that was given
    tables: Path | None = None  # measured op times that win over the roofline (`tables.py`)
    steps: StepTables | None = None  # measured step times of one model under one set of settings

    @property
    def estimated(self) -> list[str]:
        """Names of the values that nobody measured."""
        return [name for name, origin in self.provenance.items() if origin.kind == "estimated"]

    @property
    def shares_host_link(self) -> bool:
        """Whether all-reduces travel over the link that copies to the host use."""
        return self.hardware.interconnect == "pcie"

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of matrix products in a dtype.

        Raises:
          ConfigError: float32 on a device that has no `fp32_tflops`.
        """
        tflops = self.hardware.fp32_tflops if dtype == "float32" else self.hardware.bf16_tflops
        if tflops is None:
            raise ConfigError(f"device {self.name} has no fp32_tflops: run the model in bfloat16, or add them")
        return tflops * 1e12

    def allreduce(self, degree: int) -> tuple[float, float]:
        """Bus bandwidth in bytes/s and launch time in seconds of an all-reduce between so many devices.

        Raises:
          ConfigError: not known for that degree.
        """
        bandwidth, launch = self.constants.allreduce_busbw_gbs or {}, self.constants.t0_allreduce_us or {}
        if (name := str(degree)) not in bandwidth:
            raise ConfigError(
                f"device {self.name} ({self.stack}) has no allreduce_busbw_gbs between {degree} devices; "
                f"known: {', '.join(bandwidth) or 'none'}"
            )
        return bandwidth[name] * 1e9, launch[name] * 1e-6

    def title(self) -> str:
        """One line: the device, its constants, and which values are estimates."""
        estimated = ", ".join(self.estimated) or "none"
        return f"{self.name} ({self.description}), constants {self.stack}; estimated: {estimated}"

    def describe(self) -> str:
        """A table of every value with its kind (spec, measured, fitted, estimated) and its source."""
        values = vars(self.hardware) | vars(self.constants)
        return "\n".join([self.title(), provenance_table(values, self.provenance)])


def device_names() -> list[str]:
    """Registered devices."""
    return sorted(path.stem for path in (HERE / "devices").glob("*.json"))


def stack_names(device: str) -> list[str]:
    """Kernel stacks with constants for a registered device."""
    return sorted(path.stem.removeprefix(f"{device}.") for path in (HERE / "constants").glob(f"{device}.*.json"))


def load_device(name: str, stack: str | None = None) -> DeviceProfile:
    """A device under a kernel stack.

    Args:
      name: a registered device, a path to a device file, or `package.module:Name` / `file.py:Name` of a `DeviceProfile`
        or of a function without arguments that returns one.
      stack: constants of a registered device by name, or a path to a constants file; None: the device's own choice.

    Raises:
      ConfigError: an unknown name (lists the known ones), or a file that cannot be used (names it and the field).
    """
    if extension.is_external(name):
        profile = _external(name)
        if stack is None:
            return profile
        known = (profile.name, profile.description, profile.hardware, profile.provenance)
        return _profile(*known, *_constants_file(profile.name, stack))
    raw, path = _device_file(name)
    device, description, own = (read_text(raw, key, path) for key in ("name", "description", "stack"))
    hardware, origins = read_sourced(Hardware, raw, "hardware", path)
    here = "constants" in raw and stack in (None, own)
    source = (raw, path) if here else _constants_file(device, stack or own)
    return _profile(device, description, hardware, origins, *source)


def load_hardware(name: str) -> Hardware:
    """The facts of a device that may have no constants yet; `name` as for `load_device`, without the external forms.

    Raises:
      ConfigError: as `load_device`.
    """
    raw, path = _device_file(name)
    return read_sourced(Hardware, raw, "hardware", path)[0]


def _device_file(name: str) -> tuple[dict[str, Any], Path]:
    """What is in the file of a device, and its path."""
    if not name.endswith(".json") and name not in device_names():
        known = ", ".join(device_names())
        raise ConfigError(f"device {name!r} is unknown; known: {known}, a path to a .json, or {extension.FORMS}")
    return _read(name, HERE / "devices" / f"{name}.json", "device")


def _external(name: str) -> DeviceProfile:
    """The profile that a name from outside the tree stands for."""
    found = extension.load(name, "device")
    profile = found() if callable(found) else found
    if not isinstance(profile, DeviceProfile):
        raise ConfigError(f"device {name!r} is not a DeviceProfile or a function that returns one")
    return profile


def _constants_file(device: str, stack: str) -> tuple[dict[str, Any], Path]:
    """What is in the constants file that `stack` names, and its path."""
    if not stack.endswith(".json") and stack not in (known := stack_names(device)):
        names = ", ".join(known) or "none"
        raise ConfigError(f"device {device} has no constants {stack!r}; known: {names}, or a path to a .json")
    return _read(stack, HERE / "constants" / f"{device}.{stack}.json", "constants")


def _read(name: str, ours: Path, what: str) -> tuple[dict[str, Any], Path]:
    """What is in the file of that name if it is a path, in `ours` otherwise; and its path."""
    if not name.endswith(".json"):
        return read_object(ours, what), ours
    raw = read_object(Path(name), what)
    extension.record(name, Path(name))
    return raw, Path(name)


def _profile(
    name: str,
    description: str,
    hardware: Hardware,
    provenance: dict[str, Provenance],
    raw: dict[str, Any],
    path: Path,
) -> DeviceProfile:
    """A device under the constants, and with the tables, that a file holds."""
    constants, origins = read_sourced(Constants, raw, "constants", path)
    facts = {field: origin for field, origin in provenance.items() if hasattr(hardware, field)}
    stack = read_text(raw, "stack", path)
    tables = path.parent / read_text(raw, "tables", path) if "tables" in raw else None
    steps = StepTables.parse(raw["steps"], f"{path}: steps") if "steps" in raw else None
    return DeviceProfile(name, description, stack, hardware, constants, facts | origins, tables, steps)
