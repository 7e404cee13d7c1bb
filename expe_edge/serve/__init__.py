"""An HTTP server with OpenAI's completions, over one batch that requests join and leave (docs/serve.md)."""
