"""The delta rule in chunks: what a step takes away from the state depends on the state itself.

    S[t] = a[t] (S[t-1] - b[t] k[t] (k[t]^T S[t-1])) + b[t] k[t] v[t]^T              a = exp(gate), b = erase

Written as S[t] = a[t] S[t-1] + k[t] u[t]^T, each step adds what it still has to: u[t] = b[t] (v[t] - a[t] k[t]^T S[t-1]).
Inside a chunk the u depend on one another by a lower triangular matrix, so that one triangular solve gives them all
(the WY form of Yang et al. 2024); what is left is the linear form with u for values, chunk after chunk:

    (1 + strictly lower (b[i] k[i] . k[j] exp(gates between))) u = b (v - exp(gates up to i) k S)
"""

from __future__ import annotations
