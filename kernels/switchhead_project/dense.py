"""SwitchHead's V and O by one matmul of torch over all experts: the form for a CPU, and what the kernels are measured beside.

Owns: that form. Does not own: checks (the public functions). Called by: kernels/switchhead_project and its benchmark.

G C numbers per token pass through memory, E / K times those of the chosen experts. A token meets an expert that it did not choose with
0, in O's product and in both backward passes, so weights that are not finite reach every token's output in O and every row's gradient.
"""

from torch import Tensor


def project_values(x_TD: Tensor, weights_GDC: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
    """(T, H, C), the gate on the product, summed in fp32 at least and rounded once."""
    (tokens, heads, _), (groups, d_model, head_dim) = gates_THK.shape, weights_GDC.shape
    products_TX = x_TD @ weights_GDC.transpose(0, 1).reshape(d_model, groups * head_dim)
    products_THEC = products_TX.view(tokens, heads, groups // heads, head_dim)
    chosen_THKC = products_THEC.gather(2, experts_THK[..., None].long().expand(-1, -1, -1, head_dim))
    return (chosen_THKC * gates_THK[..., None]).sum(2).to(products_TX.dtype)


def project_outputs(y_THC: Tensor, weights_GCD: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
    """(T, D), the gate on the row and rounded with it; the matmul sums over heads and experts."""
    tokens, heads, _ = gates_THK.shape
    gates_THE = gates_THK.new_zeros(tokens, heads, len(weights_GCD) // heads).scatter(2, experts_THK.long(), gates_THK)
    gated_THEC = (y_THC[:, :, None] * gates_THE[..., None]).to(y_THC.dtype)
    return gated_THEC.reshape(tokens, weights_GCD.shape[:2].numel()) @ weights_GCD.flatten(0, 1)
