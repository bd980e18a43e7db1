//! The linears of a block and the sites at which they read their input.
//!
//! Linears of one site see the same activation, so they share one Hessian; what feeds the site can absorb a scale of its
//! channels. Statistics, folded scales, rotations and the sequential order of a run all read this one table.

/// One linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Queries, `[heads · head_dim, hidden]`.
    Q,
    /// Keys, `[kv_heads · head_dim, hidden]`.
    K,
    /// Values, `[kv_heads · head_dim, hidden]`.
    V,
    /// Output of the attention, `[hidden, heads · head_dim]`.
    O,
    /// The gated branch of the MLP, `[intermediate, hidden]`.
    Gate,
    /// The linear branch of the MLP, `[intermediate, hidden]`.
    Up,
    /// Output of the MLP, `[hidden, intermediate]`.
    Down,
}

impl Role {
    /// Every linear, in execution order.
    pub const ALL: [Role; 7] = [Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down];

    /// The module's path inside its block.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Role::Q => "self_attn.q_proj",
            Role::K => "self_attn.k_proj",
            Role::V => "self_attn.v_proj",
            Role::O => "self_attn.o_proj",
            Role::Gate => "mlp.gate_proj",
            Role::Up => "mlp.up_proj",
            Role::Down => "mlp.down_proj",
        }
    }

    /// The site whose activation this linear reads.
    #[must_use]
    pub const fn site(self) -> &'static Site {
        match self {
            Role::Q | Role::K | Role::V => &SITES[0],
            Role::O => &SITES[1],
            Role::Gate | Role::Up => &SITES[2],
            Role::Down => &SITES[3],
        }
    }
}

/// One norm of a block that feeds linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormRole {
    /// Before the attention.
    Input,
    /// Before the MLP.
    PostAttention,
}

impl NormRole {
    /// Both norms, in execution order.
    pub const ALL: [NormRole; 2] = [NormRole::Input, NormRole::PostAttention];

    /// The module's path inside its block.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            NormRole::Input => "input_layernorm",
            NormRole::PostAttention => "post_attention_layernorm",
        }
    }
}

/// What can take over the inverse of a scale applied to the input channels of a site's linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absorb {
    /// The elementwise weight of this norm.
    Norm(NormRole),
    /// The output rows (and bias) of this linear. With fewer key-value heads than heads, V has one row where the site has
    /// one channel per query head of the group, so such scales must agree inside a group.
    Linear(Role),
}

/// An activation and the linears that read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Name used in statistics and reports.
    pub name: &'static str,
    /// The linears that read the activation.
    pub linears: &'static [Role],
    /// What can absorb a scale of the activation's channels.
    pub absorbed_by: Absorb,
}

/// Every site of a block, in execution order: the outputs of the five pieces of [`crate::Block`] but the last.
pub static SITES: [Site; 4] = [
    Site { name: "attn_in", linears: &[Role::Q, Role::K, Role::V], absorbed_by: Absorb::Norm(NormRole::Input) },
    Site { name: "attn_out", linears: &[Role::O], absorbed_by: Absorb::Linear(Role::V) },
    Site { name: "mlp_in", linears: &[Role::Gate, Role::Up], absorbed_by: Absorb::Norm(NormRole::PostAttention) },
    Site { name: "mlp_out", linears: &[Role::Down], absorbed_by: Absorb::Linear(Role::Up) },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_linear_reads_exactly_one_site() {
        let read: Vec<Role> = SITES.iter().flat_map(|site| site.linears).copied().collect();
        assert_eq!(read, Role::ALL, "once each, in execution order");
        for role in Role::ALL {
            assert!(role.site().linears.contains(&role), "{role:?}");
        }
    }

    #[test]
    fn what_absorbs_a_site_runs_before_it() {
        for (i, site) in SITES.iter().enumerate() {
            match site.absorbed_by {
                Absorb::Linear(role) => {
                    let reads = SITES.iter().position(|s| s == role.site()).unwrap();
                    assert!(reads < i, "{} is absorbed by {role:?}", site.name);
                }
                Absorb::Norm(norm) => assert_eq!(i, 2 * NormRole::ALL.iter().position(|&n| n == norm).unwrap()),
            }
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> =
            Role::ALL.iter().map(|r| r.module()).chain(NormRole::ALL.iter().map(|n| n.module())).collect();
        names.extend(SITES.iter().map(|s| s.name));
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
