"""A model that MLflow logs and serves: OpenAI's answer, and how far it can be trusted.

Two of MLflow's servers run it: ``mlflow models serve``, and its agent server, which streams, too.
"""

from tlm_tracing.model._agent import TrustedChatAgent

__all__ = ["TrustedChatAgent"]
