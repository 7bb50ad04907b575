"""Byte-level BPE: merges learned here, run by tiktoken.

Byte-pair encoding (Gage 1994; arXiv:1508.07909) starts from the 256 bytes, and again and again
gives the pair of neighbouring tokens that occurs most often a token of its own. Bytes make up every
text, so nothing is out of vocabulary. Text is first cut into words by PATTERN, and no token crosses
from one word into the next; so it is enough to count each different word once.
"""

import codecs
import re
from collections import Counter, defaultdict

import regex  # comes with tiktoken
import tiktoken

from minisa.files import check

BYTES = [bytes([b]) for b in range(256)]
LONGEST, LETTERS = 32, 2**19    # what learn() reads: letters of a word, and of all different words
BLANKS = 10_000                 # as many blanks in a row are cut, as tiktoken fails at a million
# A word with the space before it; digits; punctuation with the line ends after it; white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+\n*|\s+(?!\S)|\s+"
# How pretrained models cut text. SmolLM cuts out every digit, then what lies between like GPT-2.
PATTERNS = {
    "minisa": PATTERN,
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": (r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
               r"|\s+(?![^\s\p{N}])|\s+"),
    "llama-bpe": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}

def learn(text, vocab_size):
    """Learn BPE on text → the tokens as bytes, in order of their ids: 256 bytes, then one a merge.

    So that any text takes seconds: longer words than LONGEST are cut, and of more LETTERS than a
    book has, only the most frequent words count. Stops early when no pair is left to merge. Raises
    ValueError if vocab_size is below 256.
    """
    if vocab_size < 256:
        raise ValueError(f"--vocab_size={vocab_size}: must be at least 256, a token for each byte")
    tokens, known, letters = list(BYTES), set(BYTES), 0
    counts = Counter(word[i:i + LONGEST] for word in regex.findall(PATTERN, text)
                     for i in range(0, len(word), LONGEST))
    words, pairs, where = [], Counter(), defaultdict(set)   # how often a pair occurs, and where
    for word, n in counts.most_common():
        letters += len(word)
        if letters > LETTERS:
            break
        ids = word.encode().decode("latin-1")               # a string of one character per token
        for pair in map("".join, zip(ids, ids[1:])):
            pairs[pair] += n
            where[pair].add(len(words))
        words.append((ids, n))
    while len(tokens) < vocab_size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)   # ties: any rule
        if best is None or pairs[best] < 1:
            break
        merged, new = tokens[ord(best[0])] + tokens[ord(best[1])], chr(len(tokens))
        if merged in known:                          # the same bytes by another way: tiktoken would
            del pairs[best]                             # take the token that is there
            continue
        for w in where.pop(best):
            ids, n = words[w]
            for pair in map("".join, zip(ids, ids[1:])):
                pairs[pair] -= n
            ids = ids.replace(best, new)
            for pair in map("".join, zip(ids, ids[1:])):
                pairs[pair] += n
                where[pair].add(w)
            words[w] = ids, n
        tokens.append(merged)
        known.add(merged)
    return tokens

class Tokenizer:
    """encode, decode and stream over a tiktoken.Encoding."""

    def __init__(self, encoding, description):
        self.encoding, self.description = encoding, description
        self.vocab_size = len(description.get("tokens", [])) or encoding.n_vocab

    @classmethod
    def from_tokens(cls, tokens, special=(), words="minisa"):
        """tokens: a list of bytes, each at its id. special: the ids that stand for no text, such as
        the end of a turn, and are never made from text. words: which of PATTERNS cuts the text.

        A pretrained model may have no token for a byte that its training text lacked; encode()
        leaves it out, as Hugging Face's tokenizers do.
        """
        special = set(special)
        names = {tokens[i].decode(): i for i in special}
        ranks = {token: i for i, token in enumerate(tokens) if i not in special}
        for byte in BYTES:
            ranks.setdefault(byte, len(tokens) + byte[0])   # past the vocabulary: encode() drops it
        encoding = tiktoken.Encoding("minisa", pat_str=PATTERNS[words], mergeable_ranks=ranks,
                                     special_tokens=names)
        description = {"kind": "bpe", "tokens": [token.hex() for token in tokens]}
        if words != "minisa":
            description |= {"special": sorted(special), "words": words}
        return cls(encoding, description)

    @classmethod
    def gpt2(cls):
        """GPT-2's 50,257 tokens, which tiktoken downloads once. Raises ValueError if it cannot."""
        try:
            return cls(tiktoken.get_encoding("gpt2"), {"kind": "gpt2"})
        except Exception as error:                   # requests' errors, tiktoken's for a wrong hash
            kind = type(error).__name__
            raise ValueError(f"--tokenizer=gpt2: tiktoken could not download it ({kind}); "
                             "go online once, or use --tokenizer=bpe, which needs no "
                             "download") from None

    @classmethod
    def load(cls, description):
        """The inverse of .description, a dict for JSON. Raises ValueError if it is none."""
        if description == {"kind": "gpt2"}:
            return cls.gpt2()
        check(description, dict, "its tokenizer")
        whole = {"special": [], "words": "minisa", **description}
        shape = {"kind": str, "tokens": [str], "special": [int], "words": str}
        check(whole, shape, "its tokenizer")
        tokens, special = whole["tokens"], whole["special"]
        known = whole["kind"] == "bpe" and whole["words"] in PATTERNS
        hexadecimal = all(re.fullmatch("([0-9a-f]{2})+", token) for token in tokens)
        twice = len(set(tokens)) < len(tokens)
        if not known or not hexadecimal or twice or not set(special) <= {*range(len(tokens))}:
            raise ValueError("its tokenizer is of an unknown kind, or damaged")
        tokens = [bytes.fromhex(token) for token in tokens]
        return cls.from_tokens(tokens, special, whole["words"])

    def encode(self, text):
        """str or bytes → list of token ids. Bytes need not be UTF-8."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids = []
        for part in re.split(f"([\udc80-\udcff]|\\s{{{BLANKS}}})", text):
            if "\udc80" <= part <= "\udcff":            # a byte that is no UTF-8
                odd = part.encode("utf-8", "surrogateescape")
                ids.append(self.encoding.encode_single_token(odd))
            else:
                ids += self.encoding.encode_ordinary(part)
        return [i for i in ids if i < self.vocab_size]

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """Token ids → str; what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_stream(self, ids):
        """Ids, as they come → pieces of text, as soon as their characters are whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.encoding.decode_single_token_bytes(i))
        yield decoder.decode(b"", final=True)
