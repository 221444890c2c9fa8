"""Which latents belong together: stored latents of several modalities, linked by key, served one direction at a time.

Comes in: LatentStores (or tensors) with a key a row; rows of equal key are pairs, so several captions of one image
share its key. Goes out: batches of paired rows, with the matrix of true matches, in which duplicates count as matches
and never as negatives. Nothing here knows the connector.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_altmoe.configuration_altmoe import parse_direction, unknown_name_message
from modeling_altmoe.latents_altmoe import LatentStore


def _codes(values: Iterable) -> tuple[np.ndarray, list]:
    """Integer codes in order of first appearance, and the values they stand for."""
    known: dict = {}
    codes = np.fromiter((known.setdefault(value, len(known)) for value in values), dtype=np.int64)
    return codes, list(known)


class LatentPairs(Dataset):
    """
    Latents of several modalities with their links.

    Item `i` of the data set is the number `i`: what it means depends on the direction of the step it is used in
    (row `i` modulo the rows of that direction's first source). So transformers' own samplers, sharding and resuming
    apply unchanged, while the direction is chosen by the schedule when the step is made.

    Args:
        latents: `{modality: (rows, latent_size)}`.
        keys: `{modality: [key of each row]}`.
        groups: `{key: concept}`; splits never divide a concept. Default: each key is its own.
        directions: what will be trained or measured.

    Raises:
        ValueError: lengths differ, a direction names an unknown modality, no key has all of a direction's
            modalities, or NaN in the latents (with the rows).
    """

    def __init__(self, latents, keys, directions, groups=None):
        self.latents = {modality: torch.as_tensor(rows) for modality, rows in latents.items()}
        self.directions = list(directions)
        for modality, rows in self.latents.items():
            if modality not in keys or len(keys[modality]) != len(rows):
                given = len(keys.get(modality, []))
                raise ValueError(f"{modality}: {len(rows)} latents, but {given} keys. Every row needs one key.")
            if not torch.isfinite(rows).all():
                bad = (~torch.isfinite(rows).all(-1)).nonzero().flatten().tolist()
                raise ValueError(
                    f"{modality}: NaN or infinity in {len(bad)} latents, rows {bad[:5]}. Encode them again."
                )
        self.keys = {modality: list(map(str, keys[modality])) for modality in self.latents}
        flat, self.key_names = _codes(key for modality in self.latents for key in self.keys[modality])
        ends = np.cumsum([len(rows) for rows in self.latents.values()])[:-1]
        self.key_codes = dict(zip(self.latents, np.split(flat, ends), strict=True))
        groups = groups or {}
        self.groups = {key: str(groups.get(key, key)) for key in self.key_names}
        group_codes, _ = _codes(self.groups[key] for key in self.key_names)
        self.group_of_key = group_codes
        self.contents = {
            modality: _codes(row.tobytes() for row in rows.numpy())[0] for modality, rows in self.latents.items()
        }
        self._rows_of_key = {modality: self._index(codes) for modality, codes in self.key_codes.items()}
        self._aliases: dict[str, np.ndarray] = {}
        self.rows = {direction: self._direction_rows(direction) for direction in self.directions}

    @classmethod
    def from_stores(cls, stores: dict[str, LatentStore], directions, columns=("key", "group")) -> "LatentPairs":
        """Link stores by their `key` column (or id) and take concepts from a `group` column where there is one."""
        key_column, group_column = columns
        latents, keys, groups = {}, {}, {}
        for modality, store in stores.items():
            latents[modality] = store.latents()
            keys[modality] = store.column(key_column if key_column in store.columns else "id")
            if group_column in store.columns:
                groups.update(zip(map(str, keys[modality]), store.column(group_column), strict=True))
        return cls(latents, keys, directions, groups)

    @staticmethod
    def _index(codes: np.ndarray) -> dict[int, np.ndarray]:
        order = np.argsort(codes, kind="stable")
        names, starts = np.unique(codes[order], return_index=True)
        return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))

    def _direction_rows(self, direction: str) -> np.ndarray:
        sources, target = parse_direction(direction)
        for modality in (*sources, target):
            if modality not in self.latents:
                raise ValueError(f"Direction '{direction}': {unknown_name_message('modality', modality, self.latents)}")
        present = set.intersection(*(set(self._rows_of_key[m]) for m in (*sources, target)))
        rows = np.flatnonzero(np.isin(self.key_codes[sources[0]], list(present)))
        if not len(rows):
            examples = {m: self.keys[m][:2] for m in (*sources, target)}
            raise ValueError(
                f"Direction '{direction}': no key has all of its modalities. Keys look like {examples}; "
                "do the stores share ids, or a 'key' column?"
            )
        return rows

    def __len__(self) -> int:
        return max(len(rows) for rows in self.rows.values())

    def __getitem__(self, index: int) -> int:
        return int(index)

    def split(self, seed: int, test_fraction: float, validation_fraction: float) -> dict[str, "LatentPairs"]:
        """`{"train", "validation", "test"}`, divided by concept: none stands on two sides.

        Raises:
            ValueError: too few concepts for the fractions.
        """
        from trainer.evaluation import split_groups  # evaluation reads pairs; a name at import time would be a circle

        names = split_groups([self.groups[key] for key in self.key_names], seed, test_fraction, validation_fraction)
        return {part: self.subset(set(map(int, codes))) for part, codes in names.items() if len(codes)}

    def subset(self, key_codes: set[int]) -> "LatentPairs":
        """Only the rows whose key has one of these codes."""
        latents, keys = {}, {}
        for modality, rows in self.latents.items():
            chosen = np.flatnonzero(np.isin(self.key_codes[modality], list(key_codes)))
            latents[modality] = rows[torch.from_numpy(chosen)]
            keys[modality] = [self.keys[modality][row] for row in chosen]
        return LatentPairs(latents, keys, self.directions, self.groups)

    def sample_concepts(self, count: int, seed: int) -> "LatentPairs":
        """The pairs of `count` concepts. Samples of one seed are nested: a larger one holds every smaller one.

        Raises:
            ValueError: more concepts asked for than there are.
        """
        here = np.unique(np.concatenate(list(self.key_codes.values())))
        concepts = sorted({self.groups[self.key_names[code]] for code in here})
        if count > len(concepts):
            raise ValueError(f"train_concepts={count}, but only {len(concepts)} concepts are left to train on.")
        order = np.random.default_rng([seed, len(concepts)]).permutation(len(concepts))
        chosen = {concepts[place] for place in order[:count]}
        return self.subset({int(code) for code in here if self.groups[self.key_names[code]] in chosen})

    # ---------------------------------------------------------------- matches

    def _keys_of_source(self, modality: str) -> np.ndarray:
        """`(rows, most)` codes of all keys under which a row's exact content occurs, padded with -1."""
        if modality not in self._aliases:
            by_content = defaultdict(set)
            for content, key in zip(self.contents[modality].tolist(), self.key_codes[modality].tolist(), strict=True):
                by_content[content].add(key)
            table = np.full((len(self.keys[modality]), max(map(len, by_content.values()))), -1)
            for row, content in enumerate(self.contents[modality].tolist()):
                found = sorted(by_content[content])
                table[row, : len(found)] = found
            self._aliases[modality] = table
        return self._aliases[modality]

    def matches(self, direction: str, source_rows: np.ndarray, target_rows: np.ndarray) -> torch.Tensor:
        """Which targets are right for which sources, `(sources, targets)` boolean.

        A target is right if it shares the source's key, or a key of an identical source, or is identical to a target
        that does. So a caption that occurs twice belongs to both of its images.
        """
        sources, target = parse_direction(direction)
        aliases = self._keys_of_source(sources[0])[source_rows]
        if len(sources) > 1:  # an identical question is another one with another image
            aliases = self.key_codes[sources[0]][source_rows][:, None]
        keys, contents = self.key_codes[target][target_rows], self.contents[target]
        result = (aliases[:, :, None] == keys[None, None, :]).any(1)
        own = [np.concatenate([self._rows_of_key[target].get(int(k), []) for k in row if k >= 0]) for row in aliases]
        identical = np.bincount(contents)
        for position, rows in enumerate(own):
            for content in set(contents[rows.astype(np.int64)].tolist()):
                if identical[content] > 1:
                    result[position] |= contents[target_rows] == content
        return torch.from_numpy(result)

    def items_of_keys(self) -> np.ndarray:
        """`(keys,)` one id for all keys that share an identical latent, directly or through others.

        Finer than concepts: a split keeps a concept together, a search must still tell its members apart.
        """
        item = np.arange(len(self.key_names))
        while True:
            before = item.copy()
            for modality, codes in self.key_codes.items():
                lowest = np.full(len(self.contents[modality]), len(item))
                np.minimum.at(lowest, self.contents[modality], item[codes])
                np.minimum.at(item, codes, lowest[self.contents[modality]])
            if (item == before).all():
                return item

    def partner(self, modality: str, keys: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        """One row of `modality` for each key code: a random one with a generator, else the first."""
        found = [self._rows_of_key[modality][int(key)] for key in keys]
        return np.array([rows[0 if generator is None else generator.integers(len(rows))] for rows in found])

    def batch(self, direction: str, index, generator: np.random.Generator | None = None) -> dict:
        """Paired rows for a step in one direction.

        Args:
            direction: one of `directions`.
            index: item numbers of this data set.
            generator: chooses among several partners of a source; None takes the first.

        Returns:
            `latents` (`{modality: (b, d)}`), `source_rows`, `target_rows` (`(b,)`), `keys` (`(b,)`).
        """
        sources, target = parse_direction(direction)
        rows = self.rows[direction][np.asarray(index, dtype=np.int64) % len(self.rows[direction])]
        keys = self.key_codes[sources[0]][rows]
        chosen = {sources[0]: rows, **{m: self.partner(m, keys, generator) for m in sources[1:]}}
        target_rows = self.partner(target, keys, generator)
        latents = {m: self.latents[m][torch.from_numpy(r)] for m, r in chosen.items()}
        if target not in latents:
            latents[target] = self.latents[target][torch.from_numpy(target_rows)]
        return {"latents": latents, "source_rows": rows, "target_rows": target_rows, "keys": keys}

    def describe(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{len(rows)} {modality}" for modality, rows in self.latents.items())
        return f"{counts} latents, {len(self.key_names)} keys, {len(set(self.groups.values()))} concepts"
