//! The calibration pass as one call: statistics, and on request sensitivities, into a file.

use crate::{Error, probe_sites};
use bitmill_calibrate::{About, Pass, StatisticsWriter, Windows, collect, model_fingerprint};
use bitmill_models::SITES;
use std::path::Path;

/// Windows of the probes, chosen evenly from the text: of 512 tokens each they say a mean divergence to about 5%.
const PROBE_WINDOWS: usize = 4;

/// Runs `windows` through the model of `pass` and writes what its sites see to `to`, which appears when it is complete;
/// with `sensitivity`, sites are probed, too. `progress` is told (steps done, steps in all).
///
/// # Errors
/// Those of the forward pass and of the disk.
pub fn calibrate(
    pass: Pass<'_>,
    windows: &Windows,
    to: &Path,
    sensitivity: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let layers = pass.spec.layers;
    if pass.spec.routing.is_some() {
        return Err(Error::Experts {
            what: "statistics of sites (calibrate, and mixtures of widths)".into(),
            dir: pass.model.dir().into(),
        });
    }
    // A probed block costs about as much as its half of all probes; the bar moves evenly enough.
    let steps = if sensitivity { 2 * layers + 1 } else { layers };
    let about = About::new(model_fingerprint(pass.model)?, windows);
    let file = StatisticsWriter::create(to, pass.spec, &about, sensitivity)?;
    collect::<Error>(pass, windows, &mut |block, stats| {
        for (site, stats) in SITES.iter().zip(stats) {
            file.site(block, site, stats)?;
        }
        progress(block + 1, steps);
        Ok(())
    })?;
    if sensitivity {
        let probes = windows.sample(PROBE_WINDOWS);
        let (weights, cross) = probe_sites(pass, &probes, &mut |done, _| progress(layers + done, steps))?;
        file.sensitivity(&weights, &cross)?;
    }
    Ok(file.finish()?)
}
