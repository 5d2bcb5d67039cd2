"""The small services that a stage does by itself, on the order `CallService`."""

from __future__ import annotations

from stages.worker.hosted_stage import HostedStage
from stages.worker.orders import Service


def do_service(hosted: HostedStage, service: Service) -> None:
    """Do one of them for a stage."""
    if service is Service.RESET_METRICS:
        hosted.reset_metrics()
    elif service is Service.RESET_STATE:
        hosted.reset_state()
    elif hosted.optimizer is not None:
        hosted.optimizer.finalize_variable_values(hosted.stage.trainable_variables)


__all__ = ["do_service"]
