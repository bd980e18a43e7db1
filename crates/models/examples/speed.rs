//! temp
use bitmill_models::*;
use rayon::prelude::*;
use std::time::Instant;
fn main() {
    let n: usize = std::env::var("POOL").map_or(2, |s| s.parse().unwrap());
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(inner);
}
fn inner() {
    let dir = std::path::Path::new("models/books-10m");
    let c = bitmill_checkpoint::Checkpoint::open(dir).unwrap();
    let mut spec = spec(c.config()).unwrap();
    let t: usize = std::env::args().nth(1).map_or(512, |s| s.parse().unwrap());
    let n = 32 * 512 / t;
    spec.max_positions = t;
    let ends = Ends::load(&spec, &c).unwrap();
    let rope = RopeTable::new(&spec.rope, t).unwrap();
    let blocks: Vec<Block> = (0..spec.layers).map(|i| Block::load(&spec, i, &c).unwrap()).collect();
    let windows: Vec<Vec<u32>> = (0..n).map(|w| (0..t).map(|i| ((i * 31 + w * 77) % 8000) as u32).collect()).collect();
    for _ in 0..2 {
        let mut h: Vec<_> = windows.par_iter().map(|w| ends.embed(w).unwrap()).collect();
        let start = Instant::now();
        let mut parts = [0.0; 6];
        for b in &blocks {
            h = h.par_iter().map(|h| b.forward(h, &rope).unwrap()).collect();
        }
        let s = start.elapsed().as_secs_f64();
        for b in &blocks {
            let s0 = Instant::now();
            let x: Vec<_> = h.par_iter().map(|h| b.attn_in(h).unwrap()).collect();
            let s1 = Instant::now();
            let x: Vec<_> = x.par_iter().map(|x| b.attn_out(x, &rope).unwrap()).collect();
            let s2 = Instant::now();
            let hx: Vec<_> = h.par_iter().zip(&x).map(|(h, x)| b.mlp_in(h, x).unwrap()).collect();
            let s3 = Instant::now();
            let x: Vec<_> = hx.par_iter().map(|(_, x)| b.mlp_out(x).unwrap()).collect();
            let s4 = Instant::now();
            h = hx.par_iter().zip(&x).map(|((h, _), x)| b.finish(h, x).unwrap()).collect();
            let s5 = Instant::now();
            for (i, d) in [s1 - s0, s2 - s1, s3 - s2, s4 - s3, s5 - s4].iter().enumerate() {
                parts[i] += d.as_secs_f64();
            }
        }
        let s5 = Instant::now();
        let l: Vec<_> =
            h.par_iter().map(|h| ends.logits(h).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap()[0]).collect();
        parts[5] = s5.elapsed().as_secs_f64();
        println!(
            "{} tokens: blocks {s:.3}s = {:.0} tok/s; parts ms {:?}  {}",
            t * n,
            (t * n) as f64 / s,
            parts.map(|p| (p * 1e3) as i64),
            l.iter().sum::<f32>()
        );
    }
}
