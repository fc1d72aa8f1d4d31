"""Scoring an answer to a sample of LongBench by the metric of its data set."""

from collections.abc import Callable
from typing import Final

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate.longbench import metrics
from loki_attn.evaluate.longbench.catalogue import DATASETS, V2, Metric
from loki_attn.evaluate.samples import Sample

_PLAIN: Final[dict[Metric, Callable[[str, str], float]]] = {
    "qa_f1": metrics.qa_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge_l": metrics.rouge_l,
    "rouge_l_zh": metrics.rouge_l_zh,
    "retrieval": metrics.retrieval,
    "retrieval_zh": metrics.retrieval_zh,
    "count": metrics.count,
    "code_similarity": metrics.code_similarity,
}


def score(dataset: str, text: str, sample: Sample) -> float:
    """Score an answer.

    Args:
        dataset: A name from `DATASETS`, or "longbench-v2".
        text: The answer.
        sample: What was asked: one question, and for classification the label "all_classes".

    Returns:
        The score by the data set's metric, in [0, 1], of the reference that it fits best.

    Raises:
        UnknownNameError: If there is no such data set.
        InputError: If the sample lacks what the metric needs.

    Source: arXiv 2308.14508 and arXiv 2412.15204, as their published programs score.
    """
    references = [one for question in sample.questions for one in question.references]
    if not references:
        raise InputError(f"Sample {sample.name!r} has no reference to score with; give it one.")
    if dataset == V2:
        return max(metrics.choice(text, one) for one in references)
    if dataset not in DATASETS:
        raise unknown_name("LongBench data set", dataset, [*DATASETS, V2])
    chosen = DATASETS[dataset]
    counted = metrics.first_line(text) if chosen.first_line else text
    if chosen.metric == "classification":
        classes = sample.labels.get("all_classes")
        if not classes:
            raise InputError(
                f"Sample {sample.name!r} of {dataset} has no label 'all_classes'; expected the "
                "names of all classes, as read_v1 gives them."
            )
        return max(metrics.classification(counted, one, classes) for one in references)
    return max(_PLAIN[chosen.metric](counted, one) for one in references)
