"""Everything this package uses of Ray that is not part of Ray's public interface, each with what happens without it.

Ray may move these names in any minor release. Nothing else in the package imports them, and nothing here fails where
they are gone: a run then goes on without the one thing that its function says.
"""

import functools
import logging
import time
from typing import Any

_PAUSE = 0.02  # seconds

# Ray Data warns here that it has no progress bars where none are asked for. Another name: the warning is seen.
_DATA_PROGRESS_LOGGER = "ray.data._internal.progress"


def autoscaler_limits() -> dict[str, float]:
    """The resources that the cluster's autoscaler may bring it to; {} where there is none.

    No public call tells. Without it a run that only fits the cluster once it has grown is refused.
    """
    try:
        from ray._private.state import state

        return dict(state.get_max_resources_from_cluster_config() or {})
    except (ImportError, AttributeError):
        return _without({}, "the autoscaler's limits")


def asks_for_token(address: str) -> bool:
    """Whether the head at ``address`` refuses who comes without a token.

    ``ray.init`` says of a wrong token what it says of a head that is away. Without this call both are said to be away.
    """
    try:
        import grpc

        with grpc.insecure_channel(address) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=5)
    except ImportError:
        return _without(False, "a head that asks for a token")
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def node_is_draining() -> bool:
    """Whether Ray has told this training worker that a node of the run is to be taken away.

    The public ``ray.train.get_preemption_info`` is a barrier: every step would wait for all workers' answers. Without
    it a drained node is noticed by SIGTERM alone, or when it is gone; the run then goes on from its last checkpoint.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except RuntimeError:  # not in a training worker
        return False
    except (ImportError, AttributeError):
        return _without(False, "word of nodes that are drained")


def one_block_each(items: list[dict[str, Any]]) -> Any:
    """A Ray Data dataset of one block an item, which says nothing of itself."""
    import ray

    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # making a dataset sets it to INFO
    logging.getLogger(_DATA_PROGRESS_LOGGER).setLevel(logging.ERROR)
    return dataset


def rest_between_turns(context: Any) -> None:
    """Let Ray Data's scheduling loop rest between two turns, for a dataset's ``DataContext``.

    The loop is a thread of the training worker, and while its output waits to be consumed it turns without rest: it
    would take the interpreter from the training thread. The context's key is public, the class that it asks for is
    not. Without it methods with many small operations train at half their speed.
    """
    try:
        context.custom_execution_callback_classes = [_pause_class()]
    except (ImportError, AttributeError):
        _without(None, "rests of Ray Data's scheduling loop")


@functools.cache
def _pause_class() -> type:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(_PAUSE)

    return Pause


@functools.cache
def _warn(what: str) -> None:
    logging.getLogger(__name__).warning("this version of Ray gives no %s", what)


def _without(answer: Any, what: str) -> Any:
    _warn(what)
    return answer
