"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from expe_edge.runtime import Completion

#: Bounds of seconds between tokens, and before the first.
BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.128, 0.256, 0.512, 1.0)
FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        name = "expe_edge_"
        self.requests = Counter(f"{name}requests", "Answers of HTTP.", ["path", "status"], registry=registry)
        self.completions = Counter(f"{name}completions", "Completions that ended.", ["reason"], registry=registry)
        self.prompt = Counter(f"{name}prompt_tokens", "Tokens of prompts.", registry=registry)
        self.reused = Counter(f"{name}reused_tokens", "Of these, read before.", registry=registry)
        self.generated = Counter(f"{name}generated_tokens", "Tokens generated.", registry=registry)
        self.queue = Gauge(f"{name}queue_length", "Completions that wait.", registry=registry)
        self.running = Gauge(f"{name}running", "Completions that run.", registry=registry)
        self.first = Histogram(f"{name}time_to_first_token_seconds", "From arrival.", registry=registry, buckets=FIRST)
        self.between = Histogram(
            f"{name}time_between_tokens_seconds", "Of one completion.", registry=registry, buckets=BETWEEN
        )
        self.batch = Histogram(f"{name}batch_size", "Rows of a step that decodes.", registry=registry, buckets=BATCHES)

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    def answered(self, path: str, status: int) -> None:
        """Note an answer."""
        self.requests.labels(path, str(status)).inc()

    def waiting(self, queue: int, running: int) -> None:
        """Note how many completions wait and run."""
        self.queue.set(queue)
        self.running.set(running)

    def step(self, rows: int) -> None:
        """Note a step of so many rows."""
        self.batch.observe(rows)

    def first_token(self, seconds: float, completion: Completion) -> None:
        """Note a first token, behind a prompt that has been read."""
        self.first.observe(seconds)
        self.prompt.inc(completion.prompt_tokens)
        self.reused.inc(completion.reused_tokens)
        self.generated.inc()

    def next_token(self, seconds: float) -> None:
        """Note another token."""
        self.between.observe(seconds)
        self.generated.inc()

    def ended(self, reason: str) -> None:
        """Note a completion's end."""
        self.completions.labels(reason).inc()
