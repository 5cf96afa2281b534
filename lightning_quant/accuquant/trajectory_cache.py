"""Float trajectories on disk: generated once by all ranks together, continued where it stopped, read by rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.accuquant.trajectories import (
    Progress,
    Trajectories,
    check_window,
    device_of,
    generate,
    histories_of,
    trajectory_bytes,
)
from lightning_quant.accuquant.trajectory_files import (
    OUTPUTS,
    STATES,
    check_description,
    describe,
    intact,
    read_row,
    write,
)
from lightning_quant.data.noise import initial_noise, numbers
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.distributed import on_all_ranks, several_ranks
from lightning_quant.utilities.hashing import fingerprint
from lightning_quant.utilities.paths import check_writable, user_path

if TYPE_CHECKING:
    from lightning_quant.accuquant.denoiser import Conditioning, Denoiser
    from lightning_quant.accuquant.samplers import Sampler


@dataclass(frozen=True)
class _Chunk:
    """Some images whose trajectories are in one file, with their conditioning."""

    path: Path
    ids: list[int]
    conditioning: Conditioning


@dataclass(frozen=True)
class _Recipe:
    """What all trajectories of a folder have in common."""

    denoiser: Denoiser
    sampler: Sampler
    shape: tuple[int, ...]
    seed: int


class _ByStep:
    """Tensors by the number of the step, each read once, when it is asked for."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read, self._found = read, dict[int, Tensor]()

    def __getitem__(self, k: int) -> Tensor:
        if k not in self._found:
            self._found[k] = self._read(k)
        return self._found[k]


class TrajectoryCache:
    """Trajectories of the float model in a folder, one file for some images each.

    The folder is that of one model, scheduler, guidance and seed; of these it can hold any images, in several calls
    of :meth:`ensure`. Ranks that share a file system generate disjoint files; a rank that does not see the files of
    the others generates them too.

    Args:
        folder: made where it is missing.
        chunk: images in a file, which is what a stopped generation loses at most.

    Example:
        >>> from tempfile import mkdtemp
        >>> from diffusers import DDIMScheduler
        >>> from lightning_quant.accuquant.samplers import sampler_of
        >>> class Denoiser:
        ...     network, guidance = torch.nn.Identity(), None
        ...     def __call__(self, x, t, conditioning):
        ...         return 0.1 * x
        >>> cache = TrajectoryCache(mkdtemp())
        >>> cache.ensure(Denoiser(), sampler_of(DDIMScheduler(), 10), {}, range(8), shape=(1, 2, 2), seed=0)
        8
        >>> cache.ensure(Denoiser(), sampler_of(DDIMScheduler(), 10), {}, range(8), shape=(1, 2, 2), seed=0)
        0
        >>> cache.window([5, 2], start=6, stop=8).states.shape
        torch.Size([3, 2, 1, 2, 2])
    """

    def __init__(self, folder: str | Path, chunk: int = 32) -> None:
        if chunk < 1:
            raise ConfigurationError(f"chunk={chunk}: expected at least one image in a file, as chunk=32.")
        self.folder, self.chunk = user_path(folder), chunk
        self._recipe: _Recipe | None = None
        # Where an image is: its file, its row there, and the conditioning of that file.
        self._rows: dict[int, tuple[_Chunk, int]] = {}

    def ensure(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        conditioning: Conditioning,
        ids: Iterable[int] | Tensor,
        shape: Sequence[int],
        seed: int,
        progress: Progress | None = None,
        batch: int | None = None,
    ) -> int:
        """Generate what is missing. Where there are several ranks, all of them call this.

        Args:
            denoiser: around the float network.
            sampler: what takes the steps.
            conditioning: rows (n, ...) by name, {} for none.
            ids: (n,) numbers of the images, all different.
            shape: (C, H, W) of a state.
            seed: of the noise.
            progress: called with the number of images after each step that they took; those that are there already
                count too. In all a rank counts its share of images times steps.
            batch: images at once, None for a file's.

        Returns:
            how many trajectories this process generated.

        Raises:
            CheckpointError: the folder's trajectories are of another model, scheduler, step count, guidance, seed or
                shape, or its description is damaged.
            ConfigurationError: not enough space on the disk, images that occur twice, rows that do not agree.
            QuantizationError: NaN in the denoiser's output, or another rank stopped.
        """
        recipe = _Recipe(denoiser, sampler, tuple(shape), seed)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)
        generated = 0

        def share() -> list[_Chunk]:
            nonlocal generated
            chunks = list(self._chunks(recipe, conditioning, numbers(ids)))
            generated = self._generate(recipe, chunks[rank::ranks], progress, batch, check=True)
            return chunks

        device = device_of(denoiser.network, torch.device("cpu"))
        chunks = on_all_ranks(share, device, "generate their trajectories")
        # Nothing, where the file system is shared.
        generated += self._generate(recipe, chunks, None, batch, check=False)
        self._recipe = recipe
        self._rows.update({number: (chunk, row) for chunk in chunks for row, number in enumerate(chunk.ids)})
        return generated

    def trajectories(self, ids: Iterable[int] | Tensor) -> Trajectories:
        """All steps of some images, (steps + 1, n, C, H, W) on the CPU, in the order of ids.

        Raises:
            ConfigurationError: an image that :meth:`ensure` did not get.
            CheckpointError: a file that is gone or damaged by now.
        """
        return self._read(numbers(ids), 0, self._steps, outputs=bool(self._known.sampler.history))

    def window(self, ids: Iterable[int] | Tensor, start: int, stop: int) -> Trajectories:
        """Steps start .. stop - 1 of some images, with the float history before each; reads no others.

        Raises:
            ConfigurationError: steps that there are not, an image that :meth:`ensure` did not get.
            CheckpointError: a file that is gone or damaged by now.
        """
        check_window(start, stop, range(self._steps))
        found = numbers(ids)
        states, outputs = (_ByStep(partial(self._at_step, found, name)) for name in (STATES, OUTPUTS))
        histories = histories_of(self._known.sampler, range(start, stop), states, outputs)
        return replace(self._read(found, start, stop, outputs=False), histories=histories)

    @property
    def _known(self) -> _Recipe:
        if self._recipe is None:
            raise ConfigurationError("The cache does not know its trajectories yet: call ensure(...) first.")
        return self._recipe

    @property
    def _steps(self) -> int:
        return len(self._known.sampler.timesteps)

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self, ids: list[int], start: int, stop: int, outputs: bool) -> Trajectories:
        recipe, rows = self._known, [self._row(number) for number in ids]
        return Trajectories(
            states=self._values(ids, STATES, start, stop + 1),
            outputs=self._values(ids, OUTPUTS, start, stop) if outputs else None,
            conditioning={
                name: torch.stack([chunk.conditioning[name][row] for chunk, row in rows])
                for name in rows[0][0].conditioning
            },
            ids=torch.tensor(ids),
            seed=recipe.seed,
            stochastic=recipe.sampler.stochastic,
            start=start,
        )

    def _values(self, ids: list[int], name: str, start: int, stop: int) -> Tensor:
        rows = [self._row(number) for number in ids]
        return torch.stack([read_row(chunk.path, name, row, start, stop) for chunk, row in rows], dim=1)

    def _at_step(self, ids: list[int], name: str, k: int) -> Tensor:
        return self._values(ids, name, k, k + 1)[0]

    def _row(self, number: int) -> tuple[_Chunk, int]:
        if number not in self._rows:
            raise ConfigurationError(
                f"Image {number} is not among the {len(self._rows)} of the cache: give its number to ensure(..., ids=)"
                " first."
            )
        return self._rows[number]

    # -- generating -----------------------------------------------------------------------------------------------

    def _chunks(self, recipe: _Recipe, conditioning: Conditioning, ids: list[int]) -> Iterator[_Chunk]:
        """The files of the images; a file's name says all that decides what is in it."""
        if len(set(ids)) < len(ids) or not ids:
            raise ConfigurationError(f"ids has {len(ids)} numbers, {len(set(ids))} of them different: write range(n).")
        _check_rows(conditioning, len(ids))
        described = describe(recipe.denoiser, recipe.sampler, recipe.shape, recipe.seed)
        check_description(self.folder, described)
        for first in range(0, len(ids), self.chunk):
            some = ids[first : first + self.chunk]
            rows = {name: values[first : first + self.chunk].cpu() for name, values in sorted(conditioning.items())}
            parts = (described, some, [(name, fingerprint(values)) for name, values in rows.items()])
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            yield _Chunk(self.folder / f"{some[0]:06d}-{some[-1]:06d}-{digest}.safetensors", some, rows)

    def _generate(
        self, recipe: _Recipe, chunks: list[_Chunk], progress: Progress | None, batch: int | None, check: bool
    ) -> int:
        missing = [chunk for chunk in chunks if not (intact(chunk.path) if check else chunk.path.is_file())]
        images = sum(len(chunk.ids) for chunk in missing)
        there = sum(len(chunk.ids) for chunk in chunks) - images
        if progress is not None and there:
            progress(there * len(recipe.sampler.timesteps))
        if missing:
            check_writable(self.folder)
            self._check_space(recipe, images)
        for chunk in missing:
            x = initial_noise(recipe.shape, chunk.ids, recipe.seed)
            made = generate(
                recipe.denoiser, recipe.sampler, x, chunk.conditioning, chunk.ids, recipe.seed, True, progress, batch
            )
            write(chunk.path, made)
        return images

    def _check_space(self, recipe: _Recipe, images: int) -> None:
        needed = trajectory_bytes(images, len(recipe.sampler.timesteps), recipe.shape, recipe.sampler.history)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigurationError(
                f"{images} trajectories need {needed / 1e9:.2f} GB, and {self.folder} has {free / 1e9:.2f} GB free:"
                " write cache_dir=FOLDER on a larger disk, or take fewer trajectories."
            )


def _check_rows(conditioning: Conditioning, images: int) -> None:
    for name, values in conditioning.items():
        if len(values) != images:
            raise ConfigurationError(f"{name} has {len(values)} rows for {images} images: give it one row for each.")
