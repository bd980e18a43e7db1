//! llama.cpp's named mixtures: which type each matrix of a model gets, as llama-quantize decides it.
//!
//! A mixture is a base type and exceptions by the matrix' place: its role, its block's number among all, how many heads
//! share a key, and whether there is calibration data. The rules are facts of llama-quantize (as of September 2026),
//! for the architectures written here; a test holds them against what that program printed.

use bitmill_models::{ModelSpec, Role};

/// A named mixture.
#[derive(Debug)]
pub struct Mix {
    /// Its name, as users write it.
    pub name: &'static str,
    /// The tensor type of everything that no rule excepts.
    pub base: &'static str,
    /// Its number in `general.file_type`.
    pub file_type: u32,
}

const fn mix(name: &'static str, base: &'static str, file_type: u32) -> Mix {
    Mix { name, base, file_type }
}

/// Every mixture.
pub static MIXES: &[Mix] = &[
    mix("f32", "F32", 0),
    mix("f16", "F16", 1),
    mix("bf16", "BF16", 32),
    mix("q8_0", "Q8_0", 7),
    mix("q6_k", "Q6_K", 18),
    mix("q5_k_m", "Q5_K", 17),
    mix("q5_k_s", "Q5_K", 16),
    mix("q5_1", "Q5_1", 9),
    mix("q5_0", "Q5_0", 8),
    mix("q4_k_m", "Q4_K", 15),
    mix("q4_k_s", "Q4_K", 14),
    mix("q4_1", "Q4_1", 3),
    mix("q4_0", "Q4_0", 2),
    mix("iq4_nl", "IQ4_NL", 25),
    mix("iq4_xs", "IQ4_XS", 30),
    mix("q3_k_l", "Q3_K", 13),
    mix("q3_k_m", "Q3_K", 12),
    mix("q3_k_s", "Q3_K", 11),
    mix("iq3_m", "IQ3_S", 27),
    mix("iq3_s", "IQ3_S", 26),
    mix("iq3_xs", "IQ3_S", 22),
    mix("iq3_xxs", "IQ3_XXS", 23),
    mix("q2_k", "Q2_K", 10),
    mix("q2_k_s", "Q2_K", 21),
    mix("iq2_m", "IQ2_S", 29),
    mix("iq2_s", "IQ2_XS", 28),
    mix("iq2_xs", "IQ2_XS", 20),
    mix("iq2_xxs", "IQ2_XXS", 19),
    mix("iq1_m", "IQ1_M", 31),
    mix("iq1_s", "IQ1_S", 24),
    mix("q2_0", "Q2_0", 41),
    mix("tq2_0", "TQ2_0", 37),
    mix("tq1_0", "TQ1_0", 36),
    mix("q1_0", "Q1_0", 40),
];

/// A matrix' place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The token embedding, where the output matrix is another.
    Embedding,
    /// The output matrix, and an embedding that is also one.
    Output,
    /// A linear of the block with this index.
    Linear(Role, usize),
}

/// What the rules ask about a model and a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances {
    layers: usize,
    /// Query heads per key head.
    sharing: usize,
    /// Whether calibration data weigh the errors.
    data: bool,
    /// Whether it has the shape that llama.cpp calls 70B.
    seventy: bool,
}

impl Circumstances {
    pub(crate) fn of(spec: &ModelSpec, data: bool) -> Self {
        let seventy = spec.layers == 80
            && match spec.model_type.as_str() {
                "qwen2" => true,
                "llama" | "mistral" => spec.heads != spec.kv_heads,
                _ => false,
            };
        Circumstances { layers: spec.layers, sharing: spec.heads / spec.kv_heads.max(1), data, seventy }
    }

    /// The first and last eighth of the blocks and every third between.
    fn more(&self, i: usize) -> bool {
        let n = self.layers;
        i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
    }

    fn first_eighth(&self, i: usize) -> bool {
        i < self.layers / 8
    }
}

impl Mix {
    /// The type of a matrix with rows of `row` weights, `block` of which make a block of the base type, by its place.
    pub(crate) fn type_of(&self, place: Place, c: &Circumstances, row: usize, block: usize) -> &'static str {
        if matches!(self.base, "F32" | "F16" | "BF16") {
            return self.base;
        }
        // Matrices that hold several follow the rules of the one that counts most.
        let place = match place {
            Place::Linear(Role::Qkv, i) => Place::Linear(Role::V, i),
            Place::Linear(Role::GateUp, i) => Place::Linear(Role::Up, i),
            other => other,
        };
        match place {
            Place::Output if !row.is_multiple_of(block) => "Q8_0",
            Place::Output if self.is_tiny() || self.name == "iq3_xxs" => "Q5_K",
            Place::Output if self.base != "Q8_0" => "Q6_K",
            Place::Output => self.base,
            Place::Embedding => self.embedding(),
            Place::Linear(role, i) if self.is_tiny() => self.tiny(role, i, c),
            Place::Linear(Role::V, i) => self.values(i, c),
            Place::Linear(Role::Down, i) => self.down(i, c),
            Place::Linear(role, i) => match (self.name, role) {
                ("iq3_xs", Role::Q | Role::K) => "IQ3_XXS",
                ("iq3_xs", Role::Gate | Role::Up) if i >= c.layers / 8 && i < 7 * c.layers / 8 => "IQ3_XXS",
                ("iq3_xxs", Role::Q | Role::K) => "IQ2_S",
                ("iq3_xxs", Role::O) => "IQ3_S",
                ("q2_k", Role::O) => "Q3_K",
                ("q3_k_m" | "iq3_m", Role::O) => "Q4_K",
                ("q3_k_l", Role::O) => "Q5_K",
                _ => self.base,
            },
        }
    }

    /// The mixtures around one and two bits, which have rules of their own.
    fn is_tiny(&self) -> bool {
        self.name.starts_with("iq1") || self.name.starts_with("iq2")
    }

    fn embedding(&self) -> &'static str {
        match self.name {
            "iq2_xxs" | "iq2_xs" | "iq1_s" | "iq1_m" => "Q2_K",
            "iq2_s" | "iq2_m" | "iq3_xxs" => "IQ3_S",
            "q2_0" | "tq1_0" | "tq2_0" => "Q4_K",
            _ => self.base,
        }
    }

    fn tiny(&self, role: Role, i: usize, c: &Circumstances) -> &'static str {
        let upper = matches!(self.name, "iq2_s" | "iq2_m");
        match role {
            Role::V if c.sharing >= 4 => "Q4_K",
            Role::O if self.name.starts_with("iq1") => "IQ2_XXS",
            Role::O if upper => "IQ3_S",
            Role::V if upper => "IQ3_S",
            Role::V => "Q2_K",
            Role::Down if c.first_eighth(i) => {
                if upper {
                    "IQ3_S"
                } else {
                    "Q2_K"
                }
            }
            _ => self.base,
        }
    }

    fn values(&self, i: usize, c: &Circumstances) -> &'static str {
        let shared = c.sharing >= 4;
        let chosen = match self.name {
            "q2_k" if !shared => "Q3_K",
            "q2_k" | "q2_k_s" | "iq3_xxs" | "iq3_xs" | "iq3_s" if shared => "Q4_K",
            "iq3_xxs" if !c.data => "IQ3_S",
            "iq3_m" => "Q4_K",
            "q3_k_m" if i < 2 => "Q5_K",
            "q3_k_m" => "Q4_K",
            "q3_k_l" => "Q5_K",
            "iq4_nl" | "iq4_xs" if shared => "Q5_K",
            "q4_k_m" | "q5_k_m" if c.more(i) => "Q6_K",
            "q4_k_s" if i < 4 => "Q5_K",
            _ => self.base,
        };
        if c.seventy && matches!(chosen, "Q3_K" | "Q4_K") { "Q5_K" } else { chosen }
    }

    fn down(&self, i: usize, c: &Circumstances) -> &'static str {
        let first = c.first_eighth(i);
        match self.name {
            "q2_k" => "Q3_K",
            "q2_k_s" if first => "Q4_K",
            "iq3_xxs" if !c.data => {
                if first {
                    "Q4_K"
                } else {
                    "Q3_K"
                }
            }
            "q3_k_m" if i < c.layers / 16 => "Q5_K",
            "q3_k_m" => "Q4_K",
            "iq3_m" if first => "Q4_K",
            "q3_k_l" => "Q5_K",
            "q4_k_m" | "q5_k_m" if c.more(i) => "Q6_K",
            "iq4_nl" | "iq4_xs" if first && !c.data => "Q5_K",
            "q4_k_s" if first => "Q5_K",
            "q4_0" if first && c.data => "Q4_1",
            "q5_0" if first && c.data => "Q5_1",
            _ => self.base,
        }
    }
}

/// What takes the place of a type whose blocks do not fill a row; half precision where that does not either.
pub(crate) fn fallback(name: &str) -> &'static str {
    match name {
        "Q2_0" | "Q2_K" | "Q3_K" | "TQ1_0" | "TQ2_0" => "Q4_0",
        "Q4_K" => "Q5_0",
        "Q5_K" => "Q5_1",
        "Q6_K" => "Q8_0",
        _ if name.starts_with("IQ") && name != "IQ4_NL" => "IQ4_NL",
        _ => "F16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf_mix;
    use bitmill_checkpoint::gguf::TYPES;
    use serde_json::Value;

    fn block(name: &str) -> usize {
        TYPES.iter().find(|t| t.name == name).unwrap().block
    }

    /// What a matrix becomes where rows may be no whole blocks.
    fn chosen(mix: &Mix, place: Place, c: &Circumstances, row: usize) -> String {
        let mut name = mix.type_of(place, c, row, block(mix.base));
        if !row.is_multiple_of(block(name)) {
            name = fallback(name);
        }
        if row.is_multiple_of(block(name)) { name.to_lowercase() } else { "f16".into() }
    }

    #[test]
    fn fused_matrices_follow_the_rules_of_values_and_of_up() {
        let c = Circumstances { layers: 16, sharing: 2, data: false, seventy: false };
        let of = |mix: &str, role, i| gguf_mix(mix).unwrap().type_of(Place::Linear(role, i), &c, 256, 256);
        for (mix, role, i, kind) in [
            ("q4_k_m", Role::Qkv, 0, "Q6_K"),
            ("q4_k_m", Role::Qkv, 2, "Q4_K"),
            ("q3_k_m", Role::Qkv, 1, "Q5_K"),
            ("q3_k_m", Role::Qkv, 2, "Q4_K"),
            ("iq2_xs", Role::Qkv, 5, "Q2_K"),
            ("iq3_xxs", Role::Qkv, 5, "IQ3_S"),
            ("iq3_xs", Role::GateUp, 1, "IQ3_S"),
            ("iq3_xs", Role::GateUp, 5, "IQ3_XXS"),
            ("q8_0", Role::GateUp, 5, "Q8_0"),
        ] {
            assert_eq!(of(mix, role, i), kind, "{mix} {role:?} {i}");
        }
    }

    #[test]
    fn every_matrix_gets_the_type_that_llama_quantize_gives_it() {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/mixes.json")).unwrap();
        let mut checked = 0;
        for (model, plans) in golden.as_object().unwrap() {
            let number = |key: &str| plans["config"][key].as_u64().unwrap() as usize;
            let (layers, hidden, inner) =
                (number("num_hidden_layers"), number("hidden_size"), number("intermediate_size"));
            let (heads, kv_heads) = (number("num_attention_heads"), number("num_key_value_heads"));
            let tied = plans["config"]["tie_word_embeddings"] == true;
            for (case, roles) in plans["mixes"].as_object().unwrap() {
                let (name, data) = case.split_once(' ').unwrap();
                let mix = gguf_mix(name).unwrap();
                let seventy = layers == 80 && heads != kv_heads;
                let c = Circumstances { layers, sharing: heads / kv_heads, data: data == "with data", seventy };
                for (role, runs) in roles.as_object().unwrap() {
                    let runs = runs.as_str().unwrap().split(' ').map(|run| run.split_once('*').unwrap());
                    let theirs: Vec<&str> =
                        runs.flat_map(|(t, n)| std::iter::repeat_n(t, n.parse().unwrap())).collect();
                    let linear = |role| (move |i| Place::Linear(role, i), layers);
                    let (row, ours): (usize, Vec<Place>) = match role.as_str() {
                        "token_embd" if tied => (hidden, vec![Place::Output]),
                        "token_embd" => (hidden, vec![Place::Embedding]),
                        "output" => (hidden, vec![Place::Output]),
                        other => {
                            let (role, row) = match other {
                                "attn_q" => (Role::Q, hidden),
                                "attn_k" => (Role::K, hidden),
                                "attn_v" => (Role::V, hidden),
                                "attn_output" => (Role::O, hidden),
                                "ffn_gate" => (Role::Gate, hidden),
                                "ffn_up" => (Role::Up, hidden),
                                "ffn_down" => (Role::Down, inner),
                                _ => panic!("{other}"),
                            };
                            let (place, count) = linear(role);
                            (row, (0..count).map(place).collect())
                        }
                    };
                    let ours: Vec<String> = ours.into_iter().map(|p| chosen(mix, p, &c, row)).collect();
                    assert_eq!(ours, theirs, "{model}, {case}: {role}");
                    checked += ours.len();
                }
            }
        }
        assert!(checked > 5000, "{checked} matrices");
    }
}
