"""Text to batches: corpora, token files on disk, and the loader that draws batches from them.

    corpora   a name, file or folder -> training and validation text
    tokens    text -> memory-mapped files of token ids (train.bin, val.bin, meta.json)
    loader    token files -> batches, as a function of the seed and the step alone

Only the loader imports torch.
"""

from fastgpt.data.corpora import Corpus, load_corpus
from fastgpt.data.tokens import TokenFiles, open_tokens, write_tokens

__all__ = ["Corpus", "TokenFiles", "load_corpus", "open_tokens", "write_tokens"]
