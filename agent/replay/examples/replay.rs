//! Replays one trace: `replay FILE none|prestage FRACTION lru|s3-fifo [LATENCY_US MBPS]`; a line of JSON.

use prestage_cache::policy::Eviction;
use prestage_replay::trace::ReadOptions;
use prestage_replay::{
    CacheSize, DeviceConfig, Footprint, Nothing, PolicyKind, Predictive, Prefetcher, ReplayConfig, TraceReader, replay,
};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let open = || TraceReader::open(Path::new(&args[1]), ReadOptions::default());
    let size = CacheSize::Fraction(args[3].parse()?);
    let footprint = Footprint::of(open()?, |_| true)?;
    let capacity_pages = footprint.capacity_pages(size);
    let config = ReplayConfig {
        trace: args[1].clone(),
        cache: footprint.fraction(size),
        threshold: None,
        capacity_pages,
        end_page: footprint.end_page,
        block_pages: 1,
        eviction: if args[4] == "lru" { Eviction::Lru } else { Eviction::S3Fifo },
        device: match args.get(5) {
            None => None,
            Some(latency_us) => Some(DeviceConfig { latency_us: latency_us.parse()?, mbps: args[6].parse()? }),
        },
        marks: Vec::new(),
        cost: false,
    };
    let mut policy: Box<dyn Prefetcher> = if args[2] == "none" {
        Box::new(Nothing)
    } else {
        Box::new(Predictive::new(PolicyKind::Prestage, 0.5, capacity_pages))
    };
    let report = replay(&config, open()?, policy.as_mut(), |_| true)?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
