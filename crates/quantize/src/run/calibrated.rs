//! The state that a calibrated run carries from block to block: the calibration text on its way through the model.

use crate::block::Flow;
use crate::journal::{Journal, io};
use crate::plan::model_scale_type;
use crate::reconstruction::Rebuild;
use crate::token_weights::occurrences;
use crate::{Calibration, Error, Observation, Plan, TokenWeights};
use bitmill_calibrate::{Spare, Stream, StreamKind, in_order};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Embedding, ModelSpec, RopeTable};
use bitmill_scheme::ScaleType;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The state that a calibrated run carries from block to block.
pub(super) struct Calibrated<'a> {
    spec: &'a ModelSpec,
    rope: RopeTable,
    lengths: Vec<usize>,
    occurrences: Vec<Vec<f32>>,
    budget: u64,
    spill: PathBuf,
    spare: Arc<Spare>,
    pub(super) hidden: Stream,
    pub(super) full: Option<Stream>,
    observation: Observation,
    cache: Option<ScaleType>,
    rebuild: Option<Rebuild<'a>>,
}

impl<'a> Calibrated<'a> {
    pub(super) fn new(
        (input, plan): (&'a Checkpoint, &'a Plan),
        calibration: Option<Calibration<'_>>,
        journal: &Journal,
        stream_memory: u64,
    ) -> Result<Option<Self>, Error> {
        let (true, Some(spec), Some(Calibration::Text(windows))) = (plan.calibrated, &plan.spec, calibration) else {
            return Ok(None);
        };
        let (settings, work) = (&plan.settings, &journal.work);
        let observation = settings.observation;
        let rebuild = settings.reconstruction.as_ref();
        let rebuild = rebuild.map(|how| Rebuild { how, model: input, plan, seed: settings.seed });
        let budget = plan.stream_budget(stream_memory);
        let (count, lengths) = (windows.count(), windows.lengths());
        let rare = observation.tokens == TokenWeights::Rare;
        let texts = (0..if rare { count } else { 0 }).map(|w| windows.tokens(w));
        let occurrences = occurrences(texts);
        let spill = work.dir().join("stream-spill");
        let hidden = Stream::of_lengths(StreamKind::Bf16, &lengths, spec.hidden, budget, &spill)?;
        let second = work.dir().join("stream-full-spill");
        let second = || Stream::of_lengths(StreamKind::Bf16, &lengths, spec.hidden, budget, &second);
        let full = settings.two_streams().then(second).transpose()?;
        let rope = RopeTable::new(&spec.ropes, windows.length)?;
        let done = journal.lines.len();
        let saved = journal.lines.last().and_then(|l| l.stream.as_ref());
        match saved {
            Some(hash) => {
                take_up(&hidden, &work.stream(done), hash)?;
                if let (Some(full), Some(hash)) = (&full, journal.lines.last().and_then(|l| l.full.as_ref())) {
                    take_up(full, &work.full_stream(done), hash)?;
                }
            }
            None => {
                let embedding = Embedding::load(spec, input)?;
                in_order(
                    count,
                    16,
                    |w| -> Result<(), Error> {
                        let h: Vec<f32> = embedding.embed(windows.get(w)?)?.flatten_all()?.to_vec1()?;
                        if let Some(full) = &full {
                            full.write(w, &h)?;
                        }
                        Ok(hidden.write(w, &h)?)
                    },
                    |_, _| Ok(()),
                )?;
            }
        }
        let spill = work.dir().to_owned();
        let cache = settings.kv_cache.then(|| model_scale_type(input));
        Ok(Some(Calibrated {
            spec,
            rope,
            lengths,
            occurrences,
            budget,
            spill,
            spare: Arc::default(),
            hidden,
            full,
            observation,
            cache,
            rebuild,
        }))
    }
}

impl Calibrated<'_> {
    /// The flow at a block, which may be the `last`.
    pub(super) fn flow(&self, last: bool) -> Flow<'_> {
        let Calibrated { spec, rope, lengths, occurrences, budget, spill, spare, hidden, full, .. } = self;
        let (budget, full, observation, cache, rebuild) =
            (*budget, full.as_ref(), self.observation, self.cache, self.rebuild);
        Flow { spec, rope, lengths, occurrences, budget, spill, spare, hidden, full, last, observation, cache, rebuild }
    }
}

/// Fills `stream` from `file`, which must have this fingerprint.
fn take_up(stream: &Stream, file: &Path, fingerprint: &str) -> Result<(), Error> {
    if stream.load(file)?.to_string() != fingerprint {
        let source = std::io::Error::other("it is not what this version left there; --force begins the run again");
        return Err(io(file, "taking up the calibration stream")(source));
    }
    Ok(())
}
