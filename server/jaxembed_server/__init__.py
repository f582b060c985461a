"""The HTTP server of jaxembed: OpenAI's embeddings API in front of one engine. Start with `jaxembed serve`."""
