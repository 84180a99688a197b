"""`layers`: convolutions of ResNet-50, MobileNet and VGG-16 at several densities."""

from __future__ import annotations

from bench import cases
from bench.measure import measure
from bench.results import Results
from bench.session import Session


def run(session: Session) -> Results:
    """Measures the layers."""
    options = session.options
    layers = list(
        cases.layer_cases(on_gpu=session.target.on_gpu, dtypes=options.dtypes)
    )
    if options.quick:
        layers = [x for x in layers if x.n == 1 and x.h <= 14 and x.density == 0.1]
    results = session.results("layers")
    session.fill(results, layers, lambda case, tell: measure(case, session.bench, tell))
    return results
