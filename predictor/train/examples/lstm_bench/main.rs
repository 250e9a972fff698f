//! The LSTM's inference and training, beside Burn's backends, onnxruntime and the multiply-add floor, in one table.
//!
//! ```text
//! lstm_bench [--json] [--python PYTHON] [--rounds N]
//! lstm_bench count PATH STEPS        steps alone, for an instruction counter
//! ```
//!
//! `benches/lstm.sh` makes a Python with onnxruntime and runs this. All candidates take turns, a slice of about 100 µs each,
//! and the median of a candidate's slices is reported: other load on the host meets all alike. What is missing on the
//! host is reported as missing. Instructions are counted by callgrind, which knows no AVX-512.

mod peak;
mod peers;

use prestage_predictor::lstm::weights::{COUNT, PARTS};
use prestage_predictor::lstm::{HIDDEN, Lead, Path, SYMBOLS, State, Token, Weights};
use prestage_train::{Backend, Corpus, TrainConfig, Trainer};
use std::error::Error;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const BATCH: usize = 64;
/// Length of a candidate's turn.
const SLICE_NS: f64 = 100_000.0;
/// Multiply-adds of a step and one lead's logits; what a token adds to the gates is looked up.
const STEP_MACS: usize = HIDDEN * 4 * HIDDEN + HIDDEN * SYMBOLS;

/// A line of the table.
struct Row {
    what: &'static str,
    name: String,
    /// Per stream.
    ns: std::result::Result<f64, String>,
}

/// Something that takes turns: `run(n)` does it n times and says how long one took, in nanoseconds a stream.
struct Candidate<'a> {
    what: &'static str,
    name: String,
    run: Box<dyn FnMut(u32) -> Result<f64> + 'a>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lstm_bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let (mut json, mut python, mut rounds) = (false, "python3".to_owned(), 200);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().cloned().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--json" => json = true,
            "--python" => python = value()?,
            "--rounds" => rounds = value()?.parse::<usize>()?.max(1),
            "count" => return count(&value()?, value()?.parse()?),
            other => return Err(format!("no such argument: {other}; see the head of this program's source").into()),
        }
    }
    let mut rows = inference(&python, rounds)?;
    for path in Path::available() {
        let ns = peers::instructions(path.name());
        rows.push(Row { what: "instructions of a step and one lead", name: path.name().into(), ns });
    }
    for backend in Backend::ALL {
        rows.push(Row {
            what: "training, tokens/s of CPU time",
            name: format!("burn-{}", backend.name()),
            ns: train(*backend),
        });
    }
    print(&rows, json);
    Ok(())
}

fn weights() -> Result<Weights> {
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    Ok(Weights::new((0..COUNT).map(|_| 0.25 * random()).collect())?)
}

fn tokens(count: usize) -> Vec<Token> {
    (0..count)
        .filter_map(|at| Token::from_bits((at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] as u16 * 61))
        .collect()
}

/// Runs `work` `times` times; nanoseconds of one, a stream.
fn clock(times: u32, streams: usize, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..times {
        work();
    }
    start.elapsed().as_nanos() as f64 / f64::from(times) / streams as f64
}

fn inference(python: &str, rounds: usize) -> Result<Vec<Row>> {
    let weights = weights()?;
    let sample = tokens(4096);
    let (mut candidates, mut missing) = (Vec::new(), Vec::new());
    for path in Path::available() {
        candidates.extend(own(&weights.clone().on(path), path, &sample));
    }
    for backend in Backend::ALL {
        candidates.extend(peers::burn(&weights, *backend, &sample));
    }
    match peers::Onnx::start(python, &weights, &sample) {
        Ok(onnx) => candidates.extend(onnx.candidates()),
        Err(error) => missing.push(Row { what: STEP_ALL, name: "onnxruntime".into(), ns: Err(error.to_string()) }),
    }
    let mut peaks = Vec::new();
    let mut slices = vec![Vec::with_capacity(rounds); candidates.len()];
    let mut times = Vec::with_capacity(candidates.len());
    for candidate in &mut candidates {
        let (mut count, streams) = (1u32, if candidate.what.contains("batch 64") { BATCH } else { 1 });
        while (candidate.run)(count)? * f64::from(count) * (streams as f64) < SLICE_NS {
            count *= 2;
        }
        times.push(count);
    }
    for _ in 0..rounds {
        peaks.push(peak::macs_per_ns());
        for ((candidate, slices), times) in candidates.iter_mut().zip(&mut slices).zip(&times) {
            // what the others left in the caches is not this one's
            (candidate.run)(times / 8 + 1)?;
            slices.push((candidate.run)(*times)?);
        }
    }
    let mut rows: Vec<Row> = candidates
        .into_iter()
        .zip(slices)
        .map(|(candidate, slices)| Row { what: candidate.what, name: candidate.name, ns: Ok(median(slices)) })
        .collect();
    rows.append(&mut missing);
    // the highest rate seen is what the core can do
    let peak = peaks.into_iter().fold(0.0, f64::max);
    rows.push(Row { what: STEP_ONE, name: "multiply-add floor".into(), ns: Ok(STEP_MACS as f64 / peak) });
    rows.sort_by_key(|row| row.what);
    Ok(rows)
}

const STEP_ONE: &str = "batch 1: step and one lead";
const STEP_ALL: &str = "batch 1: step and all leads";
const SCORE: &str = "batch 1: score 16 candidates";
const BATCH_ONE: &str = "batch 64: step and one lead";
const BATCH_ALL: &str = "batch 64: step and all leads";

fn own<'a>(weights: &Weights, path: Path, sample: &'a [Token]) -> Vec<Candidate<'a>> {
    let candidate = |what, run: Box<dyn FnMut(u32) -> Result<f64> + 'a>| Candidate {
        what,
        name: format!("prestage {}", path.name()),
        run,
    };
    let step = |leads: &'static [Lead]| {
        let (weights, mut state, mut out) = (weights.clone(), State::default(), [0.0; SYMBOLS]);
        let mut next = sample.iter().cycle();
        Box::new(move |times| {
            Ok(clock(times, 1, || {
                weights.step(&mut state, next.next().copied().unwrap_or(sample[0]));
                for lead in leads {
                    weights.logits(&state, *lead, &mut out);
                    black_box(&out);
                }
            }))
        })
    };
    let batch = |leads: &'static [Lead]| {
        let (weights, mut states, mut out) = (weights.clone(), vec![State::default(); BATCH], [0.0; SYMBOLS]);
        let mut next = sample.chunks_exact(BATCH).cycle();
        Box::new(move |times| {
            Ok(clock(times, BATCH, || {
                let tokens = next.next().unwrap_or(sample).iter().copied();
                let mut batch: Vec<_> = states.iter_mut().zip(tokens).collect();
                weights.step_batch(&mut batch);
                for state in &states {
                    for lead in leads {
                        weights.logits(state, *lead, &mut out);
                        black_box(&out);
                    }
                }
            }))
        })
    };
    let score = {
        let (weights, mut state, mut out) = (weights.clone(), State::default(), [0.0; 16]);
        weights.step(&mut state, sample[0]);
        let symbols: [u8; 16] = std::array::from_fn(|at| at as u8 * 3);
        Box::new(move |times| {
            Ok(clock(times, 1, || {
                weights.score(black_box(&state), Lead::Next, &symbols, &mut out);
                black_box(&out);
            }))
        })
    };
    vec![
        candidate(STEP_ONE, step(&[Lead::Next])),
        candidate(STEP_ALL, step(&Lead::ALL)),
        candidate(BATCH_ONE, batch(&[Lead::Next])),
        candidate(BATCH_ALL, batch(&Lead::ALL)),
        candidate(SCORE, score),
    ]
}

/// For an instruction counter: as many steps, each with one lead's logits.
fn count(path: &str, steps: usize) -> Result<()> {
    let path = Path::available().into_iter().find(|known| known.name() == path);
    let weights = weights()?.on(path.ok_or("this processor, or what emulates it, has no such path")?);
    let (mut state, mut out) = (State::default(), [0.0; SYMBOLS]);
    for token in tokens(steps) {
        weights.step(&mut state, token);
        weights.logits(&state, Lead::Next, &mut out);
        black_box(&out);
    }
    Ok(())
}

/// Tokens per second of CPU time of this thread, so that other load on the host does not count.
fn train(backend: Backend) -> std::result::Result<f64, String> {
    let corpus = Corpus::new(vec![tokens(200_000)]).map_err(|error| error.to_string())?;
    let mut trainer = Trainer::new(TrainConfig { backend, ..TrainConfig::default() }, corpus);
    let mut steps = |count| trainer.train(count, &|| false).map_err(|error| error.to_string());
    steps(2)?;
    let start = peers::cpu_ns()?;
    steps(60)?;
    let seconds = (peers::cpu_ns()? - start) / 1e9;
    Ok((60 * prestage_train::corpus::LANES * prestage_train::corpus::WINDOW) as f64 / seconds)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(rows: &[Row], json: bool) {
    if json {
        let rows: Vec<serde_json::Value> = rows
            .iter()
            .map(|row| match &row.ns {
                Ok(value) => serde_json::json!({"what": row.what, "name": row.name, "value": value}),
                Err(why) => serde_json::json!({"what": row.what, "name": row.name, "missing": why}),
            })
            .collect();
        println!(
            "{}",
            serde_json::json!({"weights": COUNT, "parts": PARTS.len(), "unit": "ns per stream", "rows": rows})
        );
        return;
    }
    let mut what = "";
    for row in rows {
        if row.what != what {
            what = row.what;
            println!("{what}{}", if what.starts_with("batch") { ", ns a stream" } else { "" });
        }
        match &row.ns {
            Ok(value) => println!("  {:<24}{value:>12.0}", row.name),
            Err(why) => println!("  {:<24}{:>12}  {why}", row.name, "-"),
        }
    }
}
