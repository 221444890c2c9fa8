"""mteb (MIEB) measures a trained run on the part of its data that it never saw, through sentence-transformers' door.

In: a folder that `altmoe train` wrote, and the data set its stores were encoded from. Out: mteb's own figures, one task a
direction. Every item goes the whole way again, from picture or caption to vector; nothing is fetched and nothing is kept.
mteb ranks by cosine, so these are the both-direction scores without the hubness correction, and `hit_rate_at_k` is what
this project calls recall@k.

    python -m benchmarks.mteb_task --run build/runs/stamps --data build/data/stamps
"""

import argparse

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from modeling_altmoe import AltMoEModel
from trainer.evaluate import read_run
from trainer.evaluation import format_table
from trainer.items import RawItems, open_data
from trainer.measuring import modality_pairs, partnered_rows, retrieval_data
from trainer.train import open_parts, open_stores

SCORES = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "ndcg_at_10")


class HeldOutRetrieval(AbsTaskRetrieval):
    """One direction over items in memory.

    Args:
        name: how mteb calls the task.
        source, target: `"text"`, `"image"` or `"audio"`.
        queries, corpus: data sets with one column, called `source` and `target`.
        relevant: `(queries, corpus)` boolean.
    """

    def __init__(self, name: str, source: str, target: str, queries: Dataset, corpus: Dataset, relevant: np.ndarray):
        self.metadata = TaskMetadata(
            name=name,
            description=f"Held-out pairs of an altmoe run, {source} to {target}.",
            dataset={"path": "in memory", "revision": "1"},
            type="Any2AnyRetrieval",
            category=f"{source[0]}2{target[0]}",
            modalities=sorted({source, target}),
            eval_langs=["und-Zyyy"],
            main_score=SCORES[0],
        )
        super().__init__()
        rows = {f"q{query}": {f"d{item}": 1 for item in np.flatnonzero(right)} for query, right in enumerate(relevant)}
        split = {
            "queries": queries.add_column("id", [f"q{i}" for i in range(len(queries))]),
            "corpus": corpus.add_column("id", [f"d{i}" for i in range(len(corpus))]),
            "relevant_docs": rows,
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


def held_out_tasks(run: str, data: str, columns: dict[str, str], part: str = "test") -> dict[str, HeldOutRetrieval]:
    """A task for each direction of a run.

    Args:
        run: folder written by `altmoe train`.
        data: the data set of its pictures and captions, one row a pair, with the ids that the stores have.
        columns: `{modality: column of its raw items}`.
        part: `"test"` or `"validation"`.

    Returns:
        `{"text->image": task, ...}`, with the matches of `altmoe evaluate`.

    Raises:
        FileNotFoundError: the run has no recipe.
        ValueError: no direction between two modalities with columns, or an item of the stores that is not in the data.
    """
    recipe = read_run(run)
    model = AltMoEModel.from_pretrained(run, load_encoders=False)
    parts, raw, tasks = open_parts(model, open_stores(recipe["stores"]), recipe), open_data(data), {}
    for pair in (p for p in modality_pairs(model.directions)[0] if set(p) <= set(columns)):
        found, items = retrieval_data(parts[part], pair), {}
        for modality, rows in partnered_rows(parts[part], pair).items():
            ids = (name for block in RawItems(data, columns[modality]).blocks() for name in block.ids)
            place = {name: row for row, name in enumerate(ids)}
            keys = [parts[part].keys[modality][row] for row in rows]
            missing = [key for key in keys if key not in place]
            if missing or len(set(keys)) < len(keys):
                raise ValueError(
                    f"{modality}: {len(missing)} of {len(keys)} items are not in the data (first: {missing[:1]}), "
                    f"{len(keys) - len(set(keys))} share an id with another. Expected one row a pair."
                )
            items[modality] = (
                raw.select([place[key] for key in keys])
                .select_columns(columns[modality])
                .rename_columns({columns[modality]: modality})
            )
        for direction in (d for d in found.directions() if d in model.directions):
            source, _, target = direction.partition("->")
            relevant = found.relevant_for(direction).numpy()
            name = f"AltMoE{source.title()}To{target.title()}"
            tasks[direction] = HeldOutRetrieval(name, source, target, items[source], items[target], relevant)
    if not tasks:
        raise ValueError(f"No direction of {', '.join(model.directions)} is between two of: {', '.join(columns)}.")
    return tasks


def mteb_encoder(repo: str, **kwargs) -> SentenceTransformerEncoderWrapper:
    """An altmoe repository as mteb wants it: mteb's own wrapper, told which modalities the model takes.

    Args:
        repo: Hub name or local folder.
        kwargs: as in `SentenceTransformer`.
    """
    encoder = SentenceTransformerEncoderWrapper(SentenceTransformer(repo, trust_remote_code=True, **kwargs))
    known = {"modalities": encoder.model.modalities}  # mteb takes every loaded model for one of texts only
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=known)
    return encoder


def measure(encoder, tasks: dict[str, HeldOutRetrieval], batch_size: int = 32) -> dict[str, dict[str, float]]:
    """mteb's scores of each task, `{direction: {score: value}}`."""
    options = {"encode_kwargs": {"batch_size": batch_size, "show_progress_bar": False}, "cache": None}
    results = mteb.evaluate(encoder, list(tasks.values()), co2_tracker=False, show_progress_bar=False, **options)
    by_name = {result.task_name: result.scores["test"][0] for result in results.task_results}
    return {direction: by_name[task.metadata.name] for direction, task in tasks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, help="folder written by 'altmoe train'")
    parser.add_argument("--data", required=True, help="data set whose items the run's stores hold")
    parser.add_argument("--model", help="what is measured: Hub name or folder (default: the run)")
    parser.add_argument("--image_column", default="image", help="column of the pictures")
    parser.add_argument("--caption_column", default="caption", help="column of the captions")
    parser.add_argument("--part", default="test", choices=("test", "validation"), help="which part of the split")
    arguments = parser.parse_args()
    columns = {"image": arguments.image_column, "text": arguments.caption_column}
    tasks = held_out_tasks(arguments.run, arguments.data, columns, arguments.part)
    scores = measure(mteb_encoder(arguments.model or arguments.run), tasks)
    print(format_table({d: {name: [float(values[name])] for name in SCORES} for d, values in scores.items()}))


if __name__ == "__main__":
    main()
