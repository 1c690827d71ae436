"""The vLLM server with guidance: launcher, request and response schema, routes, value-model versions."""
