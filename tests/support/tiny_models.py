"""Random models, of the BERT family and of bytes, small enough to be made in a test."""

from pathlib import Path

TEXT = """
the a of and rank matrix vector spectrum value query document search index score model train loss
layer token text cat dog bird fish red green blue fast slow long short new old one two three four
five six seven eight nine ten ##s ##ing ##ed . , ?
"""
WORDS = TEXT.split()


def save_tokenizer(folder: Path, words=WORDS, length=64):
    """Write a tokenizer whose vocabulary are these words; return how many tokens it has."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=length).save_pretrained(folder)
    return len(vocabulary)


def bert_config(vocabulary: int, **changes):
    from transformers import BertConfig

    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
    }
    return BertConfig(vocab_size=vocabulary, **settings | changes)


def sentence_model(
    folder: Path, *, words=WORDS, seed=0, pooling="mean", prompts=None, length=64, **changes
):
    """Return a random SentenceTransformer on the CPU."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertModel

    vocabulary = save_tokenizer(folder, words, length)
    torch.manual_seed(seed)
    config = bert_config(vocabulary, max_position_embeddings=length, **changes)
    BertModel(config).save_pretrained(folder)
    inner = Transformer(str(folder))
    width = inner.auto_model.config.hidden_size
    modules = [inner, Pooling(width, pooling_mode=pooling)]
    return SentenceTransformer(modules=modules, device="cpu", prompts=prompts).eval()


def save_encoder(folder: Path, words=WORDS, *, layers=1, length=32, seed=0) -> Path:
    """Write a random sentence encoder of 32 numbers a vector; return its folder."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = sentence_model(
        folder / "bert", words=words, seed=seed, length=length, num_hidden_layers=layers, **sizes
    )
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def cross_encoder(folder: Path, *, seed=0, labels=1):
    """Write a random cross-encoder and return its folder."""
    import torch
    from transformers import BertForSequenceClassification

    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = bert_config(vocabulary, num_labels=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def byte_language_model():
    """Return a random causal language model over bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fullrank.training.lm_data import byte_tokenizer

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )


def save_byte_language_model(folder: Path) -> Path:
    """Write :func:`byte_language_model` with its tokenizer."""
    from fullrank.training.lm_data import byte_tokenizer

    byte_language_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
