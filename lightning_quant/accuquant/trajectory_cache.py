"""Cache of float trajectories on disk, generated once by all ranks, resumable, and read by rows."""

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
from lightning_quant.utilities.distributed import on_all_ranks, rank_and_ranks
from lightning_quant.utilities.hashing import fingerprint
from lightning_quant.utilities.paths import check_writable, user_path

if TYPE_CHECKING:
    from lightning_quant.accuquant.denoiser import Conditioning, Denoiser
    from lightning_quant.accuquant.samplers import Sampler


@dataclass(frozen=True)
class _Chunk:
    """Images whose trajectories are in one file, with their conditioning."""

    path: Path
    ids: list[int]
    conditioning: Conditioning


@dataclass(frozen=True)
class _Recipe:
    """Settings that all trajectories of a folder share."""

    denoiser: Denoiser
    sampler: Sampler
    shape: tuple[int, ...]
    seed: int


class _ByStep:
    """Tensors by step, each read on first access."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read, self._tensors = read, dict[int, Tensor]()

    def __getitem__(self, k: int) -> Tensor:
        if k not in self._tensors:
            self._tensors[k] = self._read(k)
        return self._tensors[k]


class TrajectoryCache:
    """Cache of the float model's trajectories in a folder, several images per file.

    A folder belongs to one model, scheduler, guidance and seed, and can hold any number of images from several calls
    of :meth:`ensure`. Ranks that share a file system generate disjoint files; a rank that does not see the files of
    other ranks generates them too.

    Args:
        folder: Folder of the files; created if missing.
        chunk: Number of images in a file, and so the most that an interrupted generation loses.

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
        # File and row of each image.
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
        """Generate the missing trajectories; all ranks must call this together.

        Args:
            denoiser: Denoiser around the float network.
            sampler: Sampler that takes the steps.
            conditioning: Rows (n, ...) by name; {} for none.
            ids: Distinct numbers of the images, (n,).
            shape: Shape (C, H, W) of a state.
            seed: Seed of the noise.
            progress: Function that is called with the number of images after each of their steps; existing
                trajectories count too. In total a rank counts its share of images times steps.
            batch: Number of images computed at once; None computes a file's images together.

        Returns:
            Number of trajectories that this process generated.

        Raises:
            CheckpointError: Folder with trajectories of another model, scheduler, step count, guidance, seed or shape,
                or with a damaged description.
            ConfigurationError: Not enough disk space, duplicate images, or conditioning without one row per image.
            QuantizationError: Output of the denoiser with NaN or infinities, or another rank that failed.
        """
        recipe = _Recipe(denoiser, sampler, tuple(shape), seed)
        rank, ranks = rank_and_ranks()
        generated = 0

        def share() -> list[_Chunk]:
            nonlocal generated
            chunks = list(self._chunks(recipe, conditioning, numbers(ids)))
            generated = self._generate(recipe, chunks[rank::ranks], progress, batch, check=True)
            return chunks

        device = device_of(denoiser.network, torch.device("cpu"))
        chunks = on_all_ranks(share, device, "generate their trajectories")
        # Files of other ranks that this rank does not see; none on a shared file system.
        generated += self._generate(recipe, chunks, None, batch, check=False)
        self._recipe = recipe
        self._rows.update({number: (chunk, row) for chunk in chunks for row, number in enumerate(chunk.ids)})
        return generated

    def trajectories(self, ids: Iterable[int] | Tensor) -> Trajectories:
        """Read all steps of some images, (steps + 1, n, C, H, W) on the CPU, in the order of ``ids``.

        Raises:
            ConfigurationError: Image that was not passed to :meth:`ensure`.
            CheckpointError: File that has been removed or damaged since.
        """
        return self._read(numbers(ids), 0, self._steps, outputs=bool(self._ensured.sampler.history))

    def window(self, ids: Iterable[int] | Tensor, start: int, stop: int) -> Trajectories:
        """Read only the steps start .. stop - 1 of some images, with the float history before each.

        Raises:
            ConfigurationError: Steps outside the trajectories, or an image that was not passed to :meth:`ensure`.
            CheckpointError: File that has been removed or damaged since.
        """
        check_window(start, stop, range(self._steps))
        image_numbers = numbers(ids)
        states, outputs = (_ByStep(partial(self._at_step, image_numbers, name)) for name in (STATES, OUTPUTS))
        histories = histories_of(self._ensured.sampler, range(start, stop), states, outputs)
        return replace(self._read(image_numbers, start, stop, outputs=False), histories=histories)

    @property
    def _ensured(self) -> _Recipe:
        if self._recipe is None:
            raise ConfigurationError("The cache has no trajectories yet: call ensure(...) first.")
        return self._recipe

    @property
    def _steps(self) -> int:
        return len(self._ensured.sampler.timesteps)

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self, ids: list[int], start: int, stop: int, outputs: bool) -> Trajectories:
        recipe, rows = self._ensured, [self._row(number) for number in ids]
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
                f"Image {number} is not among the {len(self._rows)} of the cache: pass its number to ensure(..., ids=)"
                " first."
            )
        return self._rows[number]

    # -- generating -----------------------------------------------------------------------------------------------

    def _chunks(self, recipe: _Recipe, conditioning: Conditioning, ids: list[int]) -> Iterator[_Chunk]:
        """Yield the files of the images; the digest in a file's name covers everything that determines its content."""
        if len(set(ids)) < len(ids) or not ids:
            raise ConfigurationError(f"ids has {len(ids)} numbers, {len(set(ids))} of them different: write range(n).")
        _check_rows(conditioning, len(ids))
        described = describe(recipe.denoiser, recipe.sampler, recipe.shape, recipe.seed)
        check_description(self.folder, described)
        for first in range(0, len(ids), self.chunk):
            chunk_ids = ids[first : first + self.chunk]
            rows = {name: values[first : first + self.chunk].cpu() for name, values in sorted(conditioning.items())}
            parts = (described, chunk_ids, [(name, fingerprint(values)) for name, values in rows.items()])
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"{chunk_ids[0]:06d}-{chunk_ids[-1]:06d}-{digest}.safetensors"
            yield _Chunk(path, chunk_ids, rows)

    def _generate(
        self, recipe: _Recipe, chunks: list[_Chunk], progress: Progress | None, batch: int | None, check: bool
    ) -> int:
        missing = [chunk for chunk in chunks if not (intact(chunk.path) if check else chunk.path.is_file())]
        images = sum(len(chunk.ids) for chunk in missing)
        existing = sum(len(chunk.ids) for chunk in chunks) - images
        if progress is not None and existing:
            progress(existing * len(recipe.sampler.timesteps))
        if missing:
            check_writable(self.folder)
            self._check_space(recipe, images)
        for chunk in missing:
            x = initial_noise(recipe.shape, chunk.ids, recipe.seed)
            trajectories = generate(
                recipe.denoiser, recipe.sampler, x, chunk.conditioning, chunk.ids, recipe.seed, True, progress, batch
            )
            write(chunk.path, trajectories)
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
            raise ConfigurationError(f"{name} has {len(values)} rows for {images} images: expected one row per image.")
