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

from minisa.kit.files import check

BYTES = [bytes([b]) for b in range(256)]
# In the files of others a token is text, in GPT-2's alphabet: the visible characters of Latin-1 stand for
# themselves, the other bytes for characters from 256 up; a space is Ġ.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted({*range(256)} - {*VISIBLE})
LETTER = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE = {letter: b for b, letter in LETTER.items()}
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
        if special or words != "minisa":
            description |= {"special": sorted(special), "words": words}
        return cls(encoding, description)

    @classmethod
    def gpt2(cls):
        """GPT-2's 50,257 tokens, which tiktoken downloads once. Raises ValueError if it cannot."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
            tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
            return cls.from_tokens(tokens, [encoding.eot_token], "gpt-2")
        except Exception as error:                   # requests' errors, tiktoken's for a wrong hash
            kind = type(error).__name__
            raise ValueError(f"--tokenizer=gpt2: tiktoken could not download it ({kind}); "
                             "go online once, or use --tokenizer=bpe, which needs no "
                             "download") from None

    @classmethod
    def load(cls, description):
        """The inverse of .description, a dict for JSON. Raises ValueError if it is none."""
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

# ---- tokenizer.json, as the tokenizers library of Hugging Face writes it ----

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}

def cutters(words):
    """One of PATTERNS → the list of pre-tokenizers that cut text the same way."""
    if words == "gpt-2":
        return [BYTE_LEVEL]
    if words == "smollm":
        return [DIGITS, BYTE_LEVEL]
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[words]}, "behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]

def to_json(tokenizer):
    """A Tokenizer → the content of a tokenizer.json that gives the same ids."""
    described = tokenizer.description
    tokens = [bytes.fromhex(token) for token in described["tokens"]]
    special = described.get("special", [])
    text = [token.decode() if i in special else "".join(LETTER[b] for b in token)
            for i, token in enumerate(tokens)]
    plain = {token for i, token in enumerate(tokens) if i not in special}
    merges = []                                     # tiktoken joins any two tokens that make a third
    for i, token in enumerate(tokens):
        if i not in special:
            cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
            merges += [["".join(LETTER[b] for b in part) for part in cut]
                       for cut in cuts if plain.issuperset(cut)]
    added = [{"id": i, "content": text[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in special]
    pre = cutters(described.get("words", "minisa"))
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
        "post_processor": None, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": {token: i for i, token in enumerate(text)},
                  "merges": merges}}

def from_json(content, vocab_size=None):
    """The content of a tokenizer.json → the Tokenizer. vocab_size: how many tokens the model has, if
    more than the tokenizer. Raises ValueError if it is not a byte-level BPE that tiktoken can run."""
    model, pre = content.get("model", {}), content.get("pre_tokenizer") or {}
    odd = "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    if model.get("type") != "BPE" or any(map(model.get, odd)) or content.get("normalizer"):
        raise ValueError(f"its tokenizer is of the kind {model.get('type')}; supported is byte-level BPE")
    found = pre.get("pretokenizers", [pre])
    known = next((words for words in PATTERNS if same_cut(found, cutters(words))), None)
    if not known:
        raise ValueError("its tokenizer cuts text in a way that is not known; supported are those of GPT-2, "
                         "SmolLM2 and Llama 3")
    ids = {name: i for name, i in model["vocab"].items()}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if not all(token.get("special") for token in content.get("added_tokens", [])):
        raise ValueError("its tokenizer has added tokens that stand for text; supported are special ones")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [ids.get("".join(pair), -1) for pair in pairs]
    if merged != sorted(merged):
        raise ValueError("its tokens' ids do not rise in the order of its merges, as tiktoken needs")
    made = {"".join(pair) for pair in pairs} | added.keys()
    if not model.get("ignore_merges") and any(len(name) > 1 and name not in made for name in ids):
        raise ValueError("its tokenizer has tokens that no merge makes")
    names = {i: name for name, i in (ids | added).items()}
    if sorted(names) != [*range(len(names))]:
        raise ValueError("its tokens' ids are not 0, 1, 2, and so on")
    special = set(added.values())
    tokens = [names[i].encode() if i in special else bytes(BYTE[c] for c in names[i])
              for i in range(len(names))]
    unused = range(len(tokens), vocab_size or len(tokens))      # rows that no token has
    return Tokenizer.from_tokens([*tokens, *(f"<unused {i}>".encode() for i in unused)],
                                 [*special, *unused], known)

def same_cut(found, ours):
    """Do two lists of pre-tokenizers cut text alike?"""
    def what(part):
        kind = part.get("type")
        if kind == "ByteLevel":
            return kind, part.get("add_prefix_space", True), part.get("use_regex", True)
        if kind == "Digits":
            return kind, part.get("individual_digits", False)
        if kind == "Split":
            return kind, part.get("pattern"), part.get("behavior"), part.get("invert", False)
        return part
    return list(map(what, found)) == list(map(what, ours))
