"""view.proto: the faces of the weights, both ways."""

from __future__ import annotations

from dualtrace import views
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.v1 import view_pb2 as pb


def view_to_pb(view: views.View) -> pb.View:
    match view.face:
        case views.Face.BASE:
            return pb.View(base=pb.BaseView())
        case views.Face.FINETUNED:
            return pb.View(finetuned=pb.FinetunedView(adapter=view.adapter))
        case views.Face.SCALED:
            return pb.View(scaled=pb.ScaledView(adapter=view.adapter, lambda_value=view.strength))
        case views.Face.NULL:
            noise = view.noise
            assert noise is not None
            return pb.View(
                null=pb.NullView(
                    adapter=view.adapter,
                    seed=noise.seed,
                    init_scale=noise.init_scale,
                    rank_scale=noise.rank_scale,
                    variance_faithful=noise.variance_faithful,
                )
            )


def view_from_pb(message: pb.View, field: str) -> views.View:
    try:
        return _view(message)
    except Problem as problem:
        raise problem.at(under=field) from None


def _view(message: pb.View) -> views.View:
    match message.WhichOneof("face"):
        case "base":
            return views.BASE
        case "finetuned":
            return views.finetuned(message.finetuned.adapter)
        case "scaled":
            return views.scaled(message.scaled.adapter, message.scaled.lambda_value)
        case "null":
            given = message.null
            init = given.init_scale if given.HasField("init_scale") else views.DEFAULT_INIT_SCALE
            rank = given.rank_scale if given.HasField("rank_scale") else views.DEFAULT_RANK_SCALE
            return views.null(given.adapter, views.Noise(given.seed, init, rank, given.variance_faithful))
        case _:
            raise InvalidArgument(Reason.MISSING, "the view names no face; leave it out for base")
