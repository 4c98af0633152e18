"""Words in, numbers out: `tokenizer` (CLIP's byte-pair encoding) and `encoder` (prompts -> Conditioning)."""
