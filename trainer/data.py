"""Reading a data set: cheap checks at the start, the bytes behind each token, and the order of the training data.

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens.
"""

# Dimensions: N tokens, V vocabulary, S sequences, T tokens of a sequence.

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from trainer.errors import ConfigError, DataError
from trainer.protocol import SPLITS, TRAIN, VALIDATION, DataDir, Manifest, Shard, read_manifest, sha256_of

HEADER_INTS, MAGIC, VERSION = 256, 20240520, 1  # the challenge's shards
HEADER_BYTES = 4 * HEADER_INTS
BOS = 1  # precedes every document
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space

# Order of the training data: PR openai/parameter-golf#726, as #1060, #1218 and #1326 use it.
MIX_BATCHES = 1800  # batches over which the mixture moves from the first values below to the last
MIX_ALPHA = (0.9, 0.5)  # a shard is drawn with probability proportional to (blocks left) ** alpha
MIX_SHARDS = (8, 64)  # distinct shards of one batch


def read_shard(path: Path, shard: Shard) -> np.ndarray:
    """The tokens of a shard, mapped and not loaded; raises DataError where size or header are not the manifest's."""
    remedy = "fetch or prepare the data set again"
    if not path.is_file():
        raise DataError(f"{path}: the shard is missing", hint=remedy)
    size, expected = path.stat().st_size, HEADER_BYTES + 2 * shard.tokens
    if size != expected or size != shard.bytes:
        raise DataError(f"{path}: {size} bytes, the shard's {shard.tokens} tokens need {expected}", hint=remedy)
    header = [int(value) for value in np.fromfile(path, dtype="<i4", count=3)]
    if header != [MAGIC, VERSION, shard.tokens]:
        raise DataError(f"{path}: header {header}, must be {[MAGIC, VERSION, shard.tokens]}", hint=remedy)
    if not shard.tokens:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def load_tokenizer(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model; raises DataError for a wrong size or where bytes could not be counted with it."""
    if not path.is_file():
        raise DataError(f"{path}: the tokenizer is missing", hint="prepare the data set again")
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model", hint="prepare the data set again") from error
    if tokenizer.vocab_size() != vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.vocab_size()} pieces, the model's vocab_size is {vocab_size}",
            hint="set model.vocab_size to the tokenizer's, or take another data set",
        )
    _require_lone_space(tokenizer, path)
    return tokenizer


def _require_lone_space(tokenizer: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    """Raise DataError where bytes could not be counted with a tokenizer."""
    if tokenizer.piece_to_id(SPACE) == tokenizer.unk_id():
        raise DataError(
            f"{path}: the tokenizer has no stand-alone {SPACE} (U+2581): each space that is a token of its own would "
            "become three byte tokens and count three bytes",
            hint="train it on text in which spaces stand between words, with byte fallback",
        )


class TokenBytes:
    """UTF-8 bytes of the normalised text behind each token: the denominator of bits per byte."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        size = tokenizer.vocab_size()
        self.bytes_V = torch.zeros(size, dtype=torch.int64)
        self.leads_V = torch.zeros(size, dtype=torch.bool)  # begins with a space
        self.boundary_V = torch.zeros(size, dtype=torch.bool)  # control, unknown, unused: no text
        for token in range(size):
            piece = tokenizer.id_to_piece(token)
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                self.boundary_V[token] = True
            elif tokenizer.is_byte(token):
                self.bytes_V[token] = 1
            else:
                self.leads_V[token] = piece.startswith(SPACE)
                self.bytes_V[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())

    def bytes_of_targets(self, previous_N: Tensor, target_N: Tensor) -> Tensor:
        """Bytes of each target; a leading space counts unless the token before it stands for no text. Any shape, int64."""
        previous_N, target_N = previous_N.long(), target_N.long()
        return self.bytes_V[target_N] + (self.leads_V[target_N] & ~self.boundary_V[previous_N])


class Dataset:
    """A prepared data set whose files have been checked as far as that is cheap."""

    def __init__(self, folder: DataDir, manifest: Manifest, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer

    @classmethod
    def open(
        cls, data_dir: Path, vocab_size: int, manifest_sha256: str | None = None, *, splits: Sequence[str] = SPLITS
    ) -> Dataset:
        """Check manifest, tokenizer, every shard's size and header (of these splits), and the validation shards' content.

        The content of the training shards is left to `verify-data`: a full export would cost a minute of each run.
        Raises DataError, ProtocolError.
        """
        folder = DataDir(Path(data_dir))
        if not folder.manifest.is_file():
            raise DataError(f"{folder.manifest}: there is no data set", hint="caddie data prepare makes one")
        found = sha256_of(folder.manifest)
        if manifest_sha256 not in (None, found):
            raise DataError(
                f"{folder.manifest}: the data set has changed: sha256 {found}, the run was planned with {manifest_sha256}",
                hint="ask for the run again, or put the data set back",
            )
        manifest = read_manifest(folder.manifest)
        path = folder.root / manifest.tokenizer
        tokenizer = load_tokenizer(path, vocab_size)
        _require_sha256(path, manifest.tokenizer_sha256)
        for split in splits:
            for shard in manifest.splits[split].shards:
                read_shard(folder.root / shard.file, shard)
        for shard in manifest.splits[VALIDATION].shards:
            _require_sha256(folder.root / shard.file, shard.sha256)
        return cls(folder, manifest, tokenizer)

    def shards(self, split: str) -> list[np.ndarray]:
        """The mapped tokens of each shard of a split."""
        return [read_shard(self.folder.root / shard.file, shard) for shard in self.manifest.splits[split].shards]

    def validation_tokens(self) -> Tensor:
        """The whole validation split, int32 [N]."""
        return torch.from_numpy(np.concatenate(self.shards(VALIDATION)).astype(np.int32))

    def byte_counts(self) -> TokenBytes:
        """The table of the tokenizer's bytes."""
        return TokenBytes(self.tokenizer)


def _require_sha256(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DataError(
            f"{path}: changed bytes: sha256 {found}, the manifest says {expected}",
            hint="fetch or prepare the data set again",
        )


class _Cursor:
    """Walks through one shard's blocks of T tokens in a coprime-stride order; a new epoch draws a new order."""

    def __init__(self, tokens_N: np.ndarray, length: int, rng: np.random.Generator) -> None:
        self.tokens_N, self.length, self.rng = tokens_N, length, rng
        self.left = self._restart() if len(tokens_N) > length else 0

    def _restart(self) -> int:
        spare = len(self.tokens_N) - self.length  # places where a block and its last target fit
        self.phase = int(self.rng.integers(min(self.length, spare)))
        self.blocks = (len(self.tokens_N) - 1 - self.phase) // self.length
        self.block = int(self.rng.integers(self.blocks))
        self.stride = 1
        if self.blocks > 2:
            while math.gcd(stride := int(self.rng.integers(1, self.blocks)), self.blocks) > 1:
                pass
            self.stride = stride
        return self.blocks

    def next(self) -> tuple[np.ndarray, int]:
        """The shard's tokens and the start of its next block."""
        if not self.left:
            self.left = self._restart()
        start = self.phase + self.block * self.length
        self.block = (self.block + self.stride) % self.blocks
        self.left -= 1
        return self.tokens_N, start


class TrainLoader:
    """Batches of training sequences, in an order that follows from the seed and the shards' contents alone."""

    def __init__(self, dataset: Dataset, *, sequence_length: int, seed: int) -> None:
        self.length, self.batches = sequence_length, 0
        self.rng = np.random.default_rng(seed)
        cursors = [_Cursor(tokens_N, sequence_length, self.rng) for tokens_N in dataset.shards(TRAIN)]
        self.cursors = [cursor for cursor in cursors if cursor.left]
        if not self.cursors:
            raise ConfigError(  # of this sequence length: with another, the same data set will do
                f"{dataset.folder.root}: no training shard holds {sequence_length + 1} tokens, one sequence and its last target",
                hint="lower data.sequence_length, or take a larger data set",
            )

    def next(self, sequences: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """The next batch of `sequences` over all ranks, of it the rows rank::world_size: int64 [S, T + 1]."""
        rows = [
            tokens_N[start : start + self.length + 1] for tokens_N, start in self._draw(sequences)[rank::world_size]
        ]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def skip(self, batches: int, sequences: int) -> None:
        """Go past batches that an earlier attempt has read."""
        for _ in range(batches):
            self._draw(sequences)

    def _draw(self, sequences: int) -> list[tuple[np.ndarray, int]]:
        """Choose a batch's blocks: some distinct shards, a multinomial share of the batch each, taken in turn."""
        progress = min(1.0, self.batches / MIX_BATCHES)
        alpha, distinct = (first + (last - first) * progress for first, last in (MIX_ALPHA, MIX_SHARDS))
        self.batches += 1
        weights = np.array([cursor.left or cursor.blocks for cursor in self.cursors], dtype=np.float64) ** alpha
        size = min(round(distinct), len(weights), sequences)
        chosen = self.rng.choice(len(weights), size=size, replace=False, p=weights / weights.sum())
        shares = self.rng.multinomial(sequences, weights[chosen] / weights[chosen].sum())
        turns = sorted((turn, place) for place, share in enumerate(shares) for turn in range(share))
        return [self.cursors[chosen[place]].next() for _, place in turns]
