"""The readable definition of every operator, in plain torch.

Nothing here is fast. Every other backend is tested against these functions in float64; these functions are tested against 50
digits and numerical differentiation. They take 2-D features and return the results of the public operator, followed by the
statistics that its backward pass needs. `kernels` wraps them in the calling convention of the kernels.

Notation: x, y (B, D) features; x̂ = x / max(‖x‖, eps); c = ⟨x̂, ŷ⟩; h = (1 - c) / 2 = sin²(θ/2); w (B,) weight of x.
"""
