"""Energy counters, where the machine shows them. Virtual machines and containers often do not; then it says so.

The survey (arXiv 2401.00625) reports energy in kWh and kgCO2eq. A counter of the machine gives joules; without one, taut
counts core-seconds, and models joules only from a wattage that the user states.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter:
    """The package energy counters of the processor (RAPL), as Linux shows them under ``/sys/class/powercap``.

    ``available`` says whether they can be read, ``reason`` why not. They count the whole package: what other processes use
    as well.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: list[tuple[Path, int]] = []
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        packages = [zone for zone in zones if zone.name.count(":") == 1]  # a second colon: part of a package, counted in it
        self.reason = "" if packages else "this machine shows no energy counters"
        for zone in packages:
            try:
                if not (zone / "name").read_text().startswith("package"):
                    continue
                int((zone / "energy_uj").read_text())
                self._zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            except (OSError, ValueError) as error:
                self.reason = f"the energy counters cannot be read: {getattr(error, 'strerror', None) or error}"
        if packages and not self._zones and not self.reason:
            self.reason = "this machine shows no energy counter of a processor package"

    @property
    def available(self) -> bool:
        return bool(self._zones)

    def read(self) -> list[int]:
        """The counters now, in microjoules, one a package."""
        return [int(path.read_text()) for path, _ in self._zones]

    def joules_since(self, before: list[int]) -> float:
        """Joules since ``before = read()``; a counter that has wrapped once is put right."""
        spent = 0
        for now, then, (_, limit) in zip(self.read(), before, self._zones, strict=True):
            spent += now - then if now >= then else now - then + limit
        return spent / 1e6
