"""The replicas' metrics on one page, each sample with the replica it is of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llmc.runtime.replicas.pool import Pool


class _Page(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def merged(pages: dict[int, str], pool: Pool) -> bytes:
    """Metrics in Prometheus's text form: those of the front, then those of every replica with the label `replica`.

    Args:
        pages: what each replica that answered gave, by index.
    """
    families: dict[str, Metric] = {}
    for index, text in pages.items():
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [sample._replace(labels={"replica": str(index), **sample.labels}) for sample in family.samples]
    return generate_latest(_Page([*_own(pool), *families.values()]))


def _own(pool: Pool) -> Iterator[Metric]:
    ready = GaugeMetricFamily("llmc:replica_ready", "1 while requests are sent to the replica.", labels=["replica"])
    still = GaugeMetricFamily("llmc:replica_open_requests", "Requests the replica has not answered to the end.", labels=["replica"])
    sent = CounterMetricFamily("llmc:replica_requests", "Requests sent to the replica.", labels=["replica"])
    lost = CounterMetricFamily("llmc:replica_lost_requests", "Requests whose answer the replica did not finish.", labels=["replica"])
    for replica in pool.replicas:
        name = [str(replica.index)]
        ready.add_metric(name, float(replica.ready))
        still.add_metric(name, replica.num_open)
        sent.add_metric(name, replica.num_requests)
        lost.add_metric(name, replica.num_lost)
    yield from (ready, still, sent, lost)
