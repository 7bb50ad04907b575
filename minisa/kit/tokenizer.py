"""Byte-level BPE: merges learned here, run by tiktoken.

Byte-pair encoding (Gage 1994; arXiv:1508.07909) starts from the 256 bytes, and repeatedly gives a token
of its own to the pair of neighboring tokens that occurs most often. Every text consists of bytes, so
nothing is out of vocabulary. PATTERN first cuts text into words, and no token crosses from one word
into the next; so it is enough to process each distinct word once.
"""

import codecs
import hashlib
import json
import re
from collections import Counter, defaultdict

import regex  # comes with tiktoken
import tiktoken

BYTES = [bytes([b]) for b in range(256)]
# In others' files a token is text, in GPT-2's alphabet: the visible characters of Latin-1 stand for
# themselves, the other bytes for characters from 256 up; a space is Ġ.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted({*range(256)} - {*VISIBLE})
LETTER = {b: chr(b) for b in VISIBLE}
LETTER |= {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE = {letter: b for b, letter in LETTER.items()}
LONGEST, LETTERS = 32, 2**19    # what learn() reads at most: letters of a word, and of all distinct words
BLANKS = 10_000                 # a longer run of blanks is cut, as tiktoken fails at a million
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

def count_words(text):
    """→ the distinct words of a text, the most frequent first: a string of one character per token, and
    how often it occurs. Words longer than LONGEST are cut; those beyond LETTERS letters do not count."""
    counts = Counter(word[i:i + LONGEST] for word in regex.findall(PATTERN, text)
                     for i in range(0, len(word), LONGEST))
    words, letters = [], 0
    for word, n in counts.most_common():
        letters += len(word)
        if letters > LETTERS:
            break
        words.append((word.encode().decode("latin-1"), n))
    return words

def neighbors(ids):
    """A string → its pairs of neighbors, strings of two characters."""
    return map("".join, zip(ids, ids[1:]))

def learn(text, vocab_size):
    """Learn BPE on text → the tokens as bytes, in order of their ids: 256 bytes, then one per merge.

    So that any text takes only seconds, words longer than LONGEST are cut, and if the distinct words
    have more letters in all than LETTERS, only the most frequent count. Stops early when no pair is left
    to merge. Raises ValueError if vocab_size is below 256.
    """
    if vocab_size < 256:
        raise ValueError(f"--vocab_size={vocab_size}: must be at least 256, a token for each byte")
    words = count_words(text)
    pairs, where = Counter(), defaultdict(set)              # how often a pair occurs, and where
    for w, (ids, n) in enumerate(words):
        for pair in neighbors(ids):
            pairs[pair] += n
            where[pair].add(w)
    tokens, known = list(BYTES), set(BYTES)
    while len(tokens) < vocab_size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)   # ties: any rule
        if best is None or pairs[best] < 1:
            break
        left, right = best
        merged = tokens[ord(left)] + tokens[ord(right)]
        new = chr(len(tokens))
        if merged in known:                                 # the same bytes by another way: tiktoken
            del pairs[best]                                 # would take the token that is there
            continue
        for w in where.pop(best):
            ids, n = words[w]
            for pair in neighbors(ids):
                pairs[pair] -= n
            ids = ids.replace(best, new)
            for pair in neighbors(ids):
                pairs[pair] += n
                where[pair].add(w)
            words[w] = ids, n
        tokens.append(merged)
        known.add(merged)
    return tokens

class Tokenizer:
    """Byte-level BPE. encode, decode and stream, run by tiktoken.

    tokens: a list of bytes, each at its id. special: the ids that stand for no text, such as the end
    of a turn, and are never made from text. words: which of PATTERNS cuts the text.

    A pretrained model may have no token for a byte that its training text lacked; encode() leaves it
    out, as Hugging Face's tokenizers do.
    """

    def __init__(self, tokens, special=(), words="minisa"):
        special = set(special)
        self.tokens, self.special, self.words = tokens, sorted(special), words
        self.vocab_size = len(tokens)
        ranks = {token: i for i, token in enumerate(tokens) if i not in special}
        for byte in BYTES:
            ranks.setdefault(byte, len(tokens) + byte[0])   # past the vocabulary: encode() drops it
        self.encoding = tiktoken.Encoding(
            "minisa", pat_str=PATTERNS[words], mergeable_ranks=ranks,
            special_tokens={tokens[i].decode(): i for i in special})

    @classmethod
    def gpt2(cls):
        """GPT-2's 50,257 tokens, which tiktoken downloads once. Raises ValueError if it cannot."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:                   # requests' errors, tiktoken's for a wrong hash
            raise ValueError(f"--tokenizer=gpt2: tiktoken could not download it "
                             f"({type(error).__name__}); go online once, or use --tokenizer=bpe, "
                             "which needs no download") from None
        tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
        return cls(tokens, [encoding.eot_token], "gpt-2")

    @property
    def identity(self):
        """A hash of all that makes this tokenizer."""
        parts = [[token.hex() for token in self.tokens], self.special, self.words]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, text):
        """str → list of token ids. It may hold bytes that are not UTF-8, as surrogateescape decodes them."""
        ids = []
        for part in re.split(f"([\udc80-\udcff]|\\s{{{BLANKS}}})", text):
            if "\udc80" <= part <= "\udcff":            # a byte that is not UTF-8
                odd = part.encode("utf-8", "surrogateescape")
                ids.append(self.encoding.encode_single_token(odd))
            else:
                ids += self.encoding.encode_ordinary(part)
        return [i for i in ids if i < self.vocab_size]

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """Token ids → str; what is not UTF-8 becomes U+FFFD."""
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
    special = set(tokenizer.special)
    names = [token.decode() if i in special else visible(token)
             for i, token in enumerate(tokenizer.tokens)]
    plain = dict.fromkeys(token for i, token in enumerate(tokenizer.tokens) if i not in special)
    merges = [pair for token in plain for pair in merges_of(token, plain)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": names[i], **flags} for i in tokenizer.special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutters(tokenizer.words)},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": {name: i for i, name in enumerate(names)},
                  "merges": merges}}

def visible(token):
    """bytes → text in GPT-2's alphabet."""
    return "".join(LETTER[byte] for byte in token)

def merges_of(token, tokens):
    """The pairs of tokens that make a token: tiktoken joins any two that do."""
    pairs = []
    for n in range(1, len(token)):
        left, right = token[:n], token[n:]
        if left in tokens and right in tokens:
            pairs.append([visible(left), visible(right)])
    return pairs

def from_json(content, vocab_size=None):
    """The content of a tokenizer.json → the Tokenizer. vocab_size: how many tokens the model has, if
    more than the tokenizer. Raises ValueError if it is not a byte-level BPE that tiktoken can run."""
    model, added = content["model"], content.get("added_tokens", [])
    words = kind_of(content)
    refuse_merges(model, {token["content"] for token in added})
    special = {token["id"]: token["content"] for token in added}
    names = {i: name for name, i in model["vocab"].items()} | special
    if sorted(names) != [*range(len(names))]:
        raise ValueError("its tokens' ids are not 0, 1, 2, and so on")
    tokens = [names[i].encode() if i in special else bytes(BYTE[letter] for letter in names[i])
              for i in range(len(names))]
    if len(set(tokens)) < len(tokens):
        raise ValueError("its tokenizer has a token twice")
    unused = range(len(tokens), vocab_size or len(tokens))      # rows that no token has
    tokens += [f"<unused {i}>".encode() for i in unused]
    return Tokenizer(tokens, [*special, *unused], words)

def kind_of(content):
    """→ which of PATTERNS cuts the text. Raises ValueError unless it is one, of a byte-level BPE."""
    model, pre = content["model"], content.get("pre_tokenizer") or {}
    odd = "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    if model.get("type") != "BPE" or any(map(model.get, odd)) or content.get("normalizer"):
        raise ValueError(f"its tokenizer is of the kind {model.get('type')}; supported is byte-level BPE")
    if not all(token.get("special") for token in content.get("added_tokens", [])):
        raise ValueError("its tokenizer has added tokens that stand for text; supported are special ones")
    found = [essence(part) for part in pre.get("pretokenizers", [pre])]
    for words in PATTERNS:
        if found == [essence(part) for part in cutters(words)]:
            return words
    raise ValueError("its tokenizer cuts text in a way that is not known; supported are those of GPT-2, "
                     "SmolLM2 and Llama 3")

def refuse_merges(model, added):
    """Raises ValueError unless tiktoken gives the same result. It has no merges, but joins the pair whose
    token has the lowest id. added: the names of special tokens."""
    ids = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = ["".join(pair) for pair in pairs]
    found = [ids.get(name, -1) for name in merged]
    if found != sorted(found):
        raise ValueError("its tokens' ids do not rise in the order of its merges, as tiktoken needs")
    unmade = {name for name in ids if len(name) > 1} - set(merged) - added
    if unmade and not model.get("ignore_merges"):
        raise ValueError("its tokenizer has tokens that no merge makes")

def essence(part):
    """What a pre-tokenizer does, with its defaults filled in."""
    kind = part.get("type")
    defaults = {"ByteLevel": {"add_prefix_space": True, "use_regex": True},
                "Digits": {"individual_digits": False},
                "Split": {"pattern": None, "behavior": None, "invert": False}}.get(kind, part)
    return kind, {name: part.get(name, default) for name, default in defaults.items()}
