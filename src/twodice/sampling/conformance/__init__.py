"""The conformance kit: does a sampler, ours or foreign, draw from the distribution that it claims?

`judge` in ``verdict`` runs it; ``docs/conformance.md`` explains it. Nothing here knows the kernels that it
judges.
"""
