// Token ids of prompts by the byte-pair encoding of CLIP, as a tokenizer.json says it.

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** The character that stands for each byte: its own where that can be seen, else one from 256 up. */
function bytes() {
  const seen = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(seen(b) ? b : next++));
}

const steps = (part, many) => (part == null ? [] : part.type === "Sequence" ? part[many] : [part]);
const pattern = ({ Regex, String: text }) => new RegExp(Regex?.replaceAll("\\s", "\\p{White_Space}") ?? text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gu");

export class Tokenizer {
  constructor(file) {
    const { model, truncation, padding } = file;
    this.file = file;
    this.vocabulary = model.vocab;
    this.suffix = model.end_of_word_suffix ?? "";
    this.unknown = model.vocab[model.unk_token];
    const pairs = model.merges.map((pair) => (Array.isArray(pair) ? pair.join(" ") : pair));
    this.ranks = new Map(pairs.map((pair, rank) => [pair, rank]));
    this.bytes = bytes();
    this.encoder = new TextEncoder();
    this.special = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    this.most = truncation?.max_length ?? Infinity;
    this.padding = padding ?? null;
    [this.before, this.after] = this.around();
  }

  /** The ids that stand before and after those of a prompt. */
  around() {
    const post = this.file.post_processor;
    if (post?.type === "RobertaProcessing") return [[post.cls[1]], [post.sep[1]]];
    const [before, after] = [[], []];
    let into = before;
    for (const item of post?.single ?? []) {
      if (item.Sequence) into = after;
      else into.push(...post.special_tokens[item.SpecialToken.id].ids);
    }
    return [before, after];
  }

  normalized(text) {
    for (const step of steps(this.file.normalizer, "normalizers")) {
      if (step.type === "Lowercase") text = Array.from(text, (c) => c.toLowerCase()).join("");
      else if (step.type === "Replace") text = text.replace(pattern(step.pattern), step.content);
      else text = text.normalize(step.type);
    }
    return text;
  }

  words(text) {
    let found = [text];
    for (const step of steps(this.file.pre_tokenizer, "pretokenizers")) {
      const by = step.type === "Split" ? pattern(step.pattern) : WORDS;
      found = found.flatMap((word) => word.match(by) ?? []);
    }
    return found.map((word) => Array.from(this.encoder.encode(word), (byte) => this.bytes[byte]));
  }

  /** The ids of one word, given as the characters of its bytes: the first rule that fits joins two parts, again and again. */
  merged(parts) {
    parts = [...parts.slice(0, -1), parts.at(-1) + this.suffix];
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.vocabulary[part] ?? this.unknown);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  encode(prompt) {
    const marks = [...this.special.keys()].map((mark) => mark.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const pieces = marks.length ? prompt.split(new RegExp(`(${marks.join("|")})`)) : [prompt];
    const own = pieces.flatMap((piece) =>
      this.special.has(piece) ? [this.special.get(piece)] : this.words(this.normalized(piece)).flatMap((word) => this.merged(word)),
    );
    const ids = [...this.before, ...own.slice(0, this.most - this.before.length - this.after.length), ...this.after];
    while (ids.length < (this.padding?.strategy?.Fixed ?? 0)) ids.push(this.padding.pad_id);
    return ids;
  }
}
