import { Tokenizer } from "@huggingface/tokenizers";

/** What the page reads of a `tokenizer.json`: a byte-level BPE, as `expe-edge train` writes it. */
interface TokenizerFile {
  added_tokens: { id: number; special: boolean }[];
  model: { vocab: Record<string, number> };
}

/** Text to tokens, and back to bytes. */
export class Text {
  private readonly tokenizer: Tokenizer;
  private readonly bytes: (Uint8Array<ArrayBuffer> | null)[] = [];

  constructor(file: TokenizerFile) {
    // Without added tokens, what spells a control token is text, as for our runtime.
    this.tokenizer = new Tokenizer({ ...file, added_tokens: [] }, {});
    const control = new Set(file.added_tokens.filter(({ special }) => special).map(({ id }) => id));
    const alphabet = byteAlphabet();
    for (const [name, id] of Object.entries(file.model.vocab)) {
      this.bytes[id] = control.has(id) ? null : Uint8Array.from(name, (character) => alphabet.get(character)!);
    }
  }

  /** Tokens of a text, opened by the end-of-text token as documents were. */
  encode(text: string): number[] {
    return this.tokenizer.encode(text).ids;
  }

  decode(tokens: readonly number[]): string {
    const stream = new TextStream(this);
    return tokens.map((token) => stream.push(token)).join("") + stream.finish();
  }

  /** The bytes that a token stands for; none for a control token. */
  bytesOf(token: number): Uint8Array<ArrayBuffer> {
    return this.bytes[token] ?? new Uint8Array();
  }
}

/** Turns tokens into pieces of text, never half a character. */
export class TextStream {
  private readonly decoder = new TextDecoder();

  constructor(private readonly text: Text) {}

  push(token: number): string {
    return this.decoder.decode(this.text.bytesOf(token), { stream: true });
  }

  /** What was held back, an unfinished character. */
  finish(): string {
    return this.decoder.decode();
  }
}

/** The byte that each character of a byte-level vocabulary stands for (Radford et al., 2019). */
function byteAlphabet(): Map<string, number> {
  const printable = (byte: number) =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
  let others = 0x100;
  return new Map(
    Array.from({ length: 256 }, (_, byte) => [String.fromCodePoint(printable(byte) ? byte : others++), byte]),
  );
}
