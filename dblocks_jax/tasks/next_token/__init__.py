"""Text, token by token: the plain decoder, and blocks that each denoise the embedding of the next token."""
