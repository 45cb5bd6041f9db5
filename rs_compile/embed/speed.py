"""How fast pictures went through, and what part of it was decoding."""

from __future__ import annotations

from dataclasses import dataclass

from rs_compile.embed.loader import Batch

_LIMIT = 0.1  # share of the time spent waiting, from which decoding counts as the limit


@dataclass
class Speed:
    """Seconds of one process, without those until the first batch is done (workers start, the model compiles).

    Args:
        workers: processes that decode, beside each model.
        processes: that held the model; their seconds are added up.
    """

    workers: int
    processes: int = 1
    pictures: int = 0
    skipped: int = 0
    decoding: float = 0.0  # all workers together
    _first: bool = True
    _timed: int = 0
    _waiting: float = 0.0
    _computing: float = 0.0
    _using: float = 0.0
    first_seconds: float = 0.0

    def waited(self, seconds: float, batch: Batch) -> None:
        """For a batch that a worker decoded."""
        self.decoding += batch.seconds
        if self._first:
            self.first_seconds += seconds
        else:
            self._waiting += seconds

    def computed(self, seconds: float, batch: Batch) -> None:
        """A batch, in the model."""
        self.pictures += len(batch.names)
        self.skipped += len(batch.failures)
        if self._first:
            self.first_seconds += seconds
            self._first = not batch.names
        else:
            self._timed += len(batch.names)
            self._computing += seconds

    def used(self, seconds: float) -> None:
        """What the caller did with a batch, writing it for instance."""
        if not self._first and self._timed:
            self._using += seconds

    def add(self, other: Speed) -> None:
        """What another process did."""
        for name, value in vars(other).items():
            if name not in ("workers", "processes", "_first"):
                setattr(self, name, getattr(self, name) + value)

    @property
    def seconds(self) -> float:
        """Behind the first batch, of all processes."""
        return self._waiting + self._computing + self._using

    @property
    def per_second(self) -> float | None:
        """Pictures; None where there was one batch only."""
        return self.processes * self._timed / self.seconds if self._timed else None

    @property
    def waiting(self) -> float | None:
        """Share of the time in which the model waited for pictures; None where there was one batch only."""
        return self._waiting / self.seconds if self._timed else None

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON; seconds and shares."""
        return {
            "pictures": self.pictures,
            "skipped": self.skipped,
            "pictures_per_second": self.per_second,
            "model_share": self._computing / self.seconds if self._timed else None,
            "waiting_share": self.waiting,
            "decode_seconds_per_picture": self.decoding / max(1, self.pictures + self.skipped),
            "first_batch_seconds": self.first_seconds,
            "workers": self.workers,
        }

    def __str__(self) -> str:
        head = f"{self.pictures} pictures, {self.skipped} skipped; {self.first_seconds:.1f} s for the first batch"
        if self.per_second is None or self.waiting is None:
            return f"{head}; too few batches for a speed"
        each = 1000 * self.decoding / max(1, self.pictures + self.skipped)
        where = (
            f"{self.workers} worker{'s' if self.workers != 1 else ''}" if self.workers else "the model's own process"
        )
        where += f", beside each of {self.processes} models" if self.processes > 1 else ""
        said = (
            f"{head}, then {self.per_second:.1f} pictures a second: {self._computing / self.seconds:.0%} of the "
            f"time in the model, {self.waiting:.0%} waiting for decoding, {self._using / self.seconds:.0%} writing\n"
            f"decoding takes {each:.1f} ms a picture, in {where}"
        )
        if self.waiting < _LIMIT:
            return f"{said}; it keeps up with the model"
        return (
            f"{said}\ndecoding is the limit: the model alone does "
            f"{self.processes * self._timed / self._computing:.1f} pictures a "
            "second; more --workers (workers=), smaller files or a faster disk would help, pruning more would not"
        )
