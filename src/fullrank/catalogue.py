"""The forty methods as data: what each is for, which verb it serves, where it lives."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal, get_args

Verb = Literal["see", "train", "shrink", "order"]
VERBS: tuple[Verb, ...] = get_args(Verb)


@dataclass(frozen=True, slots=True)
class Method:
    """One published method.

    Attributes
    ----------
    slug
        Short name; also the name of its file and its page.
    title
        Of the paper, or the name it is known by.
    arxiv
        Identifier on arXiv.
    verb
        What a user does with it: see, train, shrink or order.
    entry
        Public name to start from.
    purpose
        What it is for, in one sentence.
    """

    slug: str
    title: str
    arxiv: str
    verb: Verb
    entry: str
    purpose: str

    @property
    def available(self) -> bool:
        """Whether this version has it: its package exists and exports the name.

        >>> get("galore").available
        True
        """
        package, _, name = self.entry.rpartition(".")
        try:
            return name in importlib.import_module(package).__all__
        except ModuleNotFoundError:
            return False

    @property
    def url(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


def get(slug: str) -> Method:
    """Return the method of that slug.

    Raises
    ------
    KeyError
        When there is none; the message lists those that start alike.
    """
    for method in METHODS:
        if method.slug == slug:
            return method
    alike = [m.slug for m in METHODS if m.slug[:2] == slug[:2]] or [m.slug for m in METHODS]
    raise KeyError(f"no method {slug!r}; there are {', '.join(alike)}")


def _rows(verb: Verb, *rows: tuple[str, str, str, str, str]) -> tuple[Method, ...]:
    return tuple(
        Method(slug, title, arxiv, verb, f"fullrank.{entry}", purpose)
        for slug, title, arxiv, entry, purpose in rows
    )


METHODS: tuple[Method, ...] = (
    *_rows(
        "see",
        (
            "rankme",
            "RankMe: effective rank of embeddings",
            "2210.02885",
            "spectra.rankme",
            "Compare checkpoints of an embedding model without labels.",
        ),
        (
            "gradient-quality",
            "Data quality through layer-wise gradient spectra",
            "2504.10766",
            "spectra.gradient_spectrum",
            "Judge instruction and reasoning data by the spectra of its gradients.",
        ),
        (
            "verl",
            "VERL: effective rank, its velocity and acceleration",
            "2509.23808",
            "spectra.rank_dynamics",
            "Follow hidden states along a response and shape RL advantages by them.",
        ),
        (
            "beer",
            "BEER: Bellman-equation-based automatic rank regulariser",
            "2404.12754",
            "rl.BEERRegularizer",
            "Keep the feature rank of a value network where the Bellman equation wants it.",
        ),
    ),
    *_rows(
        "train",
        (
            "galore",
            "GaLore: gradient low-rank projection",
            "2403.03507",
            "optim.GaLoreAdamW",
            "Train all parameters with Adam's moments in a low-rank subspace.",
        ),
        (
            "fira",
            "Fira: full-rank training under a low-rank constraint",
            "2410.01623",
            "optim.FiraAdamW",
            "GaLore's memory, with the rest of the gradient applied too.",
        ),
        (
            "frugal",
            "FRUGAL: stateful subspace, state-free rest",
            "2411.07837",
            "optim.FrugalAdamW",
            "Keep Adam's state for a chosen share, sign steps for the rest.",
        ),
        (
            "gradnormlorp",
            "GradNormLoRP: weight-normalised low-rank projection",
            "2412.19616",
            "optim.GradNormLoRPAdamW",
            "Low-rank projection of the gradients of normalised weights.",
        ),
        (
            "lift",
            "LIFT: low-rank informed sparse fine-tuning",
            "2506.00772",
            "optim.LIFT",
            "Fine-tune the few weights that matter after rank reduction.",
        ),
        (
            "lora-pro",
            "LoRA-Pro",
            "2407.18242",
            "optim.LoRAPro",
            "Make LoRA's steps as close to full fine-tuning as they can be.",
        ),
        (
            "adamp",
            "AdamP and SGDP",
            "2006.08217",
            "optim.AdamP",
            "Drop the norm-growing part of steps on scale-invariant weights.",
        ),
        (
            "mkor",
            "MKOR: momentum-enabled Kronecker-factored optimizer with rank-1 updates",
            "2306.01685",
            "optim.MKOR",
            "Second-order preconditioning at the price of rank-1 updates.",
        ),
        (
            "eva",
            "EVA: explained variance adaptation",
            "2410.07170",
            "adapters.eva",
            "Start LoRA where a layer's inputs vary most, and share out the ranks.",
        ),
        (
            "lora-ga",
            "LoRA-GA: low-rank adaptation with gradient approximation",
            "2407.05000",
            "adapters.lora_ga",
            "Start LoRA from the gradient, to learn as fast as full fine-tuning.",
        ),
        (
            "lora-sb",
            "LoRA-SB: initialisation using update approximation",
            "2411.19557",
            "adapters.lora_sb",
            "Train r x r numbers a matrix, from the first full fine-tuning step.",
        ),
        (
            "randlora",
            "RandLoRA: full-rank fine-tuning of large models",
            "2502.00987",
            "adapters.RandLoraConfig",
            "Full-rank updates from scaled random bases.",
        ),
        (
            "flylora",
            "FlyLoRA: implicit rank-wise mixture of experts",
            "2510.08396",
            "adapters.FlyLoraConfig",
            "LoRA whose ranks are experts behind a frozen sparse router.",
        ),
        (
            "hydra",
            "Hydra: multi-head low-rank adaptation",
            "2309.06922",
            "adapters.HydraConfig",
            "A parallel and a sequential low-rank branch that fold into the weight.",
        ),
        (
            "efficient-pretraining",
            "Scalable parameter- and memory-efficient pre-training",
            "2505.22922",
            "pretrain.refactorize_",
            "Pre-train in less memory: factorised weights, refactorised on the way.",
        ),
        (
            "infinite-compute",
            "Pre-training under infinite compute",
            "2509.14786",
            "pretrain.PowerLaw",
            "Get the most from little text: strong decay, ensembles, asymptotes.",
        ),
    ),
    *_rows(
        "shrink",
        (
            "lord",
            "LoRD: low-rank decomposition for one-shot compression",
            "2309.14021",
            "compress.lord_compress",
            "Factor layers by what they put out on calibration text, without training.",
        ),
        (
            "greenformers",
            "Greenformers: low-rank transformers",
            "2108.10808",
            "compress.greenformers",
            "Factorised transformers and conv nets, from scratch or after training.",
        ),
        (
            "pela",
            "PELA: low-rank approximation with intermediate pre-training",
            "2310.10700",
            "compress.pela_compress",
            "Factor a backbone once and repair it by a short pre-training.",
        ),
        (
            "trp",
            "Trained rank pruning",
            "2004.14566",
            "compress.TRP",
            "Push a conv net to low rank while it trains.",
        ),
        (
            "maestro",
            "Maestro: trainable low-rank decomposition",
            "2308.14929",
            "compress.Maestro",
            "Train once, cut to any rank afterwards.",
        ),
        (
            "welore",
            "WeLore: non-uniform weight low-rank projection",
            "2407.11239",
            "compress.welore_compress",
            "Give each matrix the rank its spectrum asks for; fine-tune only those.",
        ),
        (
            "sla",
            "SLA: sparse-linear attention",
            "2509.24006",
            "attention.SparseLinearAttention",
            "Replace most of a diffusion transformer's attention by cheaper kinds.",
        ),
        (
            "metainf",
            "MetaInf: meta-learning for accelerated inference",
            "2410.21340",
            "accelerate.AccelerationSelector",
            "Choose an inference acceleration from past measurements.",
        ),
    ),
    *_rows(
        "order",
        (
            "rankify",
            "Rankify: retrieval, reranking and RAG",
            "2502.02464",
            "retrieval.ListwiseReranker",
            "One interface for retrievers, rerankers and generators.",
        ),
        (
            "e2rank",
            "E2Rank: an embedding model as a listwise reranker",
            "2510.22733",
            "retrieval.E2RankReranker",
            "Rerank with one more vector made of the query and the top documents.",
        ),
        (
            "rank-r1",
            "Rank-R1: setwise reranking with reasoning",
            "2503.06034",
            "retrieval.SetwiseReranker",
            "Rerank by a model that reasons, then names the best of a set.",
        ),
        (
            "iranker",
            "IRanker: iterative elimination",
            "2506.21638",
            "retrieval.IterativeEliminationReranker",
            "Rank by removing the worst item step by step.",
        ),
        (
            "pyramid-ernie",
            "Pre-trained language models for web-scale ranking (Pyramid-ERNIE)",
            "2105.11108",
            "retrieval.PyramidEncoder",
            "Cross-encode long pages within a latency budget.",
        ),
        (
            "dla",
            "Dual learning algorithm for unbiased learning to rank",
            "1804.05938",
            "ltr.DualLearning",
            "Learn to rank from biased clicks.",
        ),
        (
            "g-rank",
            "G-Rank: unsupervised continuous learn-to-rank in a P2P network",
            "2301.12530",
            "ltr.GRank",
            "Rank on each user's device from gossiped click logs.",
        ),
        (
            "aw-moe",
            "AW-MoE: attention-weighted mixture of experts",
            "2306.05011",
            "ltr.AWMoE",
            "A personal mixture of experts for each user of a shop.",
        ),
        (
            "llm-recsys",
            "Evaluating a language model as a recommender",
            "2309.03613",
            "recommend.LLMRecommender",
            "Compare a chat model with classical recommenders, beyond accuracy.",
        ),
        (
            "matrix-completion",
            "Low-rank matrix completion via robust alternating minimisation",
            "2302.11068",
            "recommend.MatrixCompletion",
            "Fill in a low-rank matrix from few entries in nearly linear time.",
        ),
        (
            "rankef",
            "RankEF: ranking code candidates with execution feedback",
            "2408.13976",
            "candidates.RankEFModel",
            "Put the right program first without running them.",
        ),
        (
            "rank2score",
            "Rank2Score: text-to-3D quality assessment",
            "2509.23841",
            "candidates.Rank2Score",
            "Score generated 3D assets as people would.",
        ),
    ),
)
"""All forty, by verb."""
