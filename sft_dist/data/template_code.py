"""What a chat template is compiled to: Jinja's own code, with provenance and a meter.

- constants and template data become traced literals, `~` joins them with their shadows;
- the body of each loop, macro and block begins with `environment.step(n)`, n being what its own statements take;
- what `in`, a comparison, a slice or `{{ }}` looks at goes through the environment, which counts it first.

Jinja takes no new kinds of nodes. `_Through` is the one of its kinds that no template makes, with a name: what it
wraps goes through that function of the environment.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame

from sft_dist.data.render_budget import MAX_BITS

_TICKS_A_STEP = 4
# What a node takes, in ticks of about 50 ns; one tick where nothing stands here. Calls are counted when they are made.
_TICKS: dict[type[nodes.Node], int] = {
    nodes.Getattr: 12,
    nodes.Getitem: 12,
    nodes.NSRef: 18,
    nodes.Filter: 18,
    nodes.Test: 9,
    nodes.Concat: 24,
    nodes.Add: 9,
    nodes.Sub: 9,
    nodes.Mul: 18,
    nodes.Pow: 9,
    nodes.Mod: 18,
    nodes.List: 16,  # memory too: an empty one takes 72 bytes
    nodes.Tuple: 12,
    nodes.Dict: 32,
    nodes.Pair: 12,
    nodes.Slice: 12,
    nodes.AssignBlock: 24,
    nodes.FilterBlock: 24,
    nodes.CallBlock: 24,
    nodes.For: 18,
    nodes.Macro: 18,
}
_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)  # counted each time they run
_Through = nodes.MarkSafeIfAutoescape


class MeteredCode(CodeGenerator):
    """Compiles constants into traced literals, joins strings with their shadows, counts what the template does."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        parts: list[Any] = [*node.find_all(_BODIES)]
        for part in parts:
            steps = 1 + sum(map(_ticks, part.body)) // _TICKS_A_STEP
            part.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute(f"step({steps})")).set_lineno(part.lineno))
        super().visit_Template(node, frame)

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.literals[{node.value!r}]")
            return
        if isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
            self.fail(f"a number of {node.value.bit_length():,} bits", node.lineno)
        super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(f"environment.literals[{node.data!r}]")

    def _output_const_repr(self, group: Any) -> str:
        return f"environment.literals[{super()._output_const_repr(group)}]"

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        """Nothing is computed while the template is compiled, when nothing is counted."""
        if not isinstance(node, (nodes.Const, nodes.TemplateData)):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        """`str(...)` of a value whose text is not too long."""
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
            self.write("environment.printed(")
        else:
            self.write("environment.text(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_post(node, frame, finalize)
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self.write(")")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """A turn that its condition leaves out runs no body: it is counted on its way to the condition."""
        if node.test is not None:
            node.iter = _through("counted", node.iter)
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """What is compared is counted, but beside a constant: its comparison is as short as the constant.

        What is looked for in another text may not be opaque: the other one would look at it.
        """
        left: Any = node
        for right in node.ops:
            if right.op in ("in", "notin"):
                left.expr = left.expr if _is_constant(left.expr) else _through("sought", left.expr)
                right.expr = right.expr if _is_constant(right.expr) else _through("searched", right.expr)
            elif not _is_constant(left.expr) and not _is_constant(right.expr):
                left.expr = _through("compared", left.expr)
            left = right
        super().visit_Compare(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("sliced", node.node)
        super().visit_Getitem(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        for pair in node.items:
            if not _is_constant(pair.key):
                pair.key = _through("hashed", pair.key)
        super().visit_Dict(node, frame)

    def visit_MarkSafeIfAutoescape(self, node: Any, frame: Frame) -> None:
        self.write(f"environment.{node.through}(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(environment.text, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


def _through(name: str, expression: nodes.Node) -> Any:
    node: Any = _Through(expression).set_lineno(expression.lineno)
    node.through, node.as_const = name, _not_now
    return node


def _not_now(eval_ctx: nodes.EvalContext | None = None) -> Any:
    """No value while the template is compiled."""
    raise nodes.Impossible


def _is_constant(node: nodes.Expr) -> bool:
    """Whether its size is that of what is written in the template."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


def _ticks(node: nodes.Node) -> int:
    """What `node` takes each time it runs, without the bodies that count by themselves; of branches the dearest."""
    own = _TICKS.get(type(node), 1)
    if isinstance(node, nodes.If):
        branches: list[list[Any]] = [node.body, *([part] for part in node.elif_), node.else_]
        return own + _ticks(node.test) + max(sum(map(_ticks, branch)) for branch in branches)
    skipped = ("body",) if isinstance(node, _BODIES) else ()
    return own + sum(map(_ticks, node.iter_child_nodes(exclude=skipped)))
