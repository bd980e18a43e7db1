//! The linears of a block and the sites at which they read their input.
//!
//! Linears of one site see the same activation, so they share one Hessian; what feeds the site can absorb a scale of its
//! channels. Statistics, folded scales, rotations and the sequential order of a run all read this one table.

/// One linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Q, K and V stored as one, `[(heads + 2 · kv_heads) · head_dim, hidden]`.
    Qkv,
    /// Queries, `[heads · head_dim, hidden]`.
    Q,
    /// Keys, `[kv_heads · head_dim, hidden]`.
    K,
    /// Values, `[kv_heads · head_dim, hidden]`.
    V,
    /// Output of the attention, `[hidden, heads · head_dim]`.
    O,
    /// Gate and Up stored as one, `[2 · intermediate, hidden]`.
    GateUp,
    /// The gated branch of the MLP, `[intermediate, hidden]`; not every MLP has one.
    Gate,
    /// The linear branch of a gated MLP, the only one of a plain MLP, `[intermediate, hidden]`.
    Up,
    /// Output of the MLP, `[hidden, intermediate]`.
    Down,
    /// The gated branch of an expert, `[expert width, hidden]`.
    ExpertGate(Expert),
    /// The linear branch of an expert, `[expert width, hidden]`.
    ExpertUp(Expert),
    /// Output of an expert, `[hidden, expert width]`.
    ExpertDown(Expert),
}

/// One MLP of several that stand in the place of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expert {
    /// One of those that a router chooses from, by its index.
    Routed(u16),
    /// The one that every token goes to.
    Shared,
}

impl Role {
    /// Every linear outside of experts, in execution order. A block has some of them.
    pub const ALL: [Role; 9] =
        [Role::Qkv, Role::Q, Role::K, Role::V, Role::O, Role::GateUp, Role::Gate, Role::Up, Role::Down];

    /// What it is in an MLP, whichever expert's.
    #[must_use]
    pub const fn kind(self) -> Role {
        match self {
            Role::ExpertGate(_) => Role::Gate,
            Role::ExpertUp(_) => Role::Up,
            Role::ExpertDown(_) => Role::Down,
            other => other,
        }
    }

    /// The expert it is a part of, if it is.
    #[must_use]
    pub const fn expert(self) -> Option<Expert> {
        match self {
            Role::ExpertGate(expert) | Role::ExpertUp(expert) | Role::ExpertDown(expert) => Some(expert),
            _ => None,
        }
    }

    /// Gate, up and down of an expert.
    #[must_use]
    pub const fn of_expert(expert: Expert) -> [Role; 3] {
        [Role::ExpertGate(expert), Role::ExpertUp(expert), Role::ExpertDown(expert)]
    }

    /// Its place in [`Role::ALL`]; experts' linears have none.
    pub(crate) fn index(self) -> Option<usize> {
        Role::ALL.iter().position(|&role| role == self)
    }

    /// Its name in options and messages, the one that most decoders give the module.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.kind() {
            Role::Qkv => "qkv_proj",
            Role::Q => "q_proj",
            Role::K => "k_proj",
            Role::V => "v_proj",
            Role::O => "o_proj",
            Role::GateUp => "gate_up_proj",
            Role::Gate | Role::ExpertGate(_) => "gate_proj",
            Role::Up | Role::ExpertUp(_) => "up_proj",
            Role::Down | Role::ExpertDown(_) => "down_proj",
        }
    }

    /// The site whose activation this linear reads.
    #[must_use]
    pub const fn site(self) -> &'static Site {
        match self {
            Role::Qkv | Role::Q | Role::K | Role::V => &SITES[0],
            Role::O => &SITES[1],
            Role::GateUp | Role::Gate | Role::Up | Role::ExpertGate(_) | Role::ExpertUp(_) => &SITES[2],
            Role::Down | Role::ExpertDown(_) => &SITES[3],
        }
    }

    /// What a linear stores together, or itself alone; nothing of experts, whose linears are never stored together.
    #[must_use]
    pub const fn parts(self) -> &'static [Role] {
        match self {
            Role::Qkv => &[Role::Q, Role::K, Role::V],
            Role::Q => &[Role::Q],
            Role::K => &[Role::K],
            Role::V => &[Role::V],
            Role::O => &[Role::O],
            Role::GateUp => &[Role::Gate, Role::Up],
            Role::Gate => &[Role::Gate],
            Role::Up => &[Role::Up],
            Role::Down => &[Role::Down],
            Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_) => &[],
        }
    }
}

/// A place of a block where a norm may stand; each architecture has some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormRole {
    /// Before the attention, beside the residual stream (pre-norm).
    Input,
    /// Of what the attention puts out, before it is added to the residual stream.
    AttnOutput,
    /// In the residual stream itself, once the attention is added (post-norm).
    AttnResidual,
    /// Before the MLP, beside the residual stream (pre-norm).
    PostAttention,
    /// Of what the MLP puts out, before it is added to the residual stream.
    MlpOutput,
    /// In the residual stream itself, once the MLP is added (post-norm).
    MlpResidual,
}

impl NormRole {
    /// Every place, in execution order.
    pub const ALL: [NormRole; 6] = [
        NormRole::Input,
        NormRole::AttnOutput,
        NormRole::AttnResidual,
        NormRole::PostAttention,
        NormRole::MlpOutput,
        NormRole::MlpResidual,
    ];
}

/// What can take over the inverse of a scale applied to the input channels of a site's linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absorb {
    /// The elementwise weight (and bias) of this norm.
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
    /// What can absorb a scale of the activation's channels, if anything.
    pub absorbed_by: Option<Absorb>,
}

impl Site {
    /// Whether `role` reads the activation, or its expert's share of it.
    #[must_use]
    pub fn reads(&self, role: Role) -> bool {
        self.linears.contains(&role.kind())
    }

    /// What reads the activation, parts that one linear stores together apart.
    #[must_use]
    pub fn parts(&self) -> Vec<Role> {
        self.linears.iter().flat_map(|role| role.parts()).copied().collect()
    }
}

/// Every site of a block, in execution order: the outputs of the five pieces of [`crate::Block`] but the last. This is the
/// fullest block, pre-norm with a gated MLP, in every way of storing it; [`crate::ModelSpec::sites`] narrows it to what an
/// architecture has.
pub static SITES: [Site; 4] = [
    Site {
        name: "attn_in",
        linears: &[Role::Qkv, Role::Q, Role::K, Role::V],
        absorbed_by: Some(Absorb::Norm(NormRole::Input)),
    },
    Site { name: "attn_out", linears: &[Role::O], absorbed_by: Some(Absorb::Linear(Role::V)) },
    Site {
        name: "mlp_in",
        linears: &[Role::GateUp, Role::Gate, Role::Up],
        absorbed_by: Some(Absorb::Norm(NormRole::PostAttention)),
    },
    Site { name: "mlp_out", linears: &[Role::Down], absorbed_by: Some(Absorb::Linear(Role::Up)) },
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
            assert!(role.parts().iter().all(|part| part.site() == role.site()), "{role:?}");
        }
    }

    #[test]
    fn what_absorbs_a_site_runs_before_it() {
        for (i, site) in SITES.iter().enumerate() {
            match site.absorbed_by {
                Some(Absorb::Linear(role)) => {
                    let reads = SITES.iter().position(|s| s == role.site()).unwrap();
                    assert!(reads < i, "{} is absorbed by {role:?}", site.name);
                }
                Some(Absorb::Norm(norm)) => {
                    // The norms of sites stand before attention and MLP; the other four behind the two.
                    assert_eq!(NormRole::ALL.iter().position(|&n| n == norm).unwrap(), i / 2 * 3);
                }
                None => panic!("{}: the fullest block can absorb everywhere", site.name),
            }
        }
    }
}
