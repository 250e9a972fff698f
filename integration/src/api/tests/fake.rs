//! A daemon that answers what a test needs.

use tokio::sync::Notify;

use super::super::types::*;
use super::super::*;

#[derive(Debug, Default)]
pub(super) struct Fake {
    pub(super) entered: Notify,
    pub(super) go_on: Notify,
    pub(super) finished: Notify,
}

pub(super) fn no<'a, T: Send + 'a>() -> Reply<'a, T> {
    Box::pin(async { Err(ApiError::internal("not in this test")) })
}

impl models::ModelControl for Fake {
    fn models(&self) -> Reply<'_, models::ModelList> {
        no()
    }
    fn model(&self, _: i64) -> Reply<'_, models::ModelDetail> {
        no()
    }
    fn model_train(&self, _: models::TrainRequest) -> Reply<'_, models::TrainStarted> {
        Box::pin(async { Ok(models::TrainStarted::default()) })
    }
    fn model_evaluate(&self, _: i64) -> Reply<'_, models::ModelMetrics> {
        no()
    }
    fn model_promote(&self, id: i64) -> Reply<'_, models::ChampionChanged> {
        Box::pin(async move { Ok(models::ChampionChanged { champion: Some(id), ..Default::default() }) })
    }
    fn model_rollback(&self, _: models::RollbackRequest) -> Reply<'_, models::ChampionChanged> {
        no()
    }
    fn model_export(&self, id: i64) -> Reply<'_, Bytes> {
        Box::pin(async move { Ok(Bytes::from(format!("model {id}"))) })
    }
    fn model_import(&self, file: Bytes, scope: Option<String>) -> Reply<'_, models::ModelImported> {
        let scope = format!("{} bytes of {scope:?}", file.len());
        Box::pin(async { Ok(models::ModelImported { scope, model: 5, before: None }) })
    }
    fn thresholds(&self) -> Reply<'_, models::Thresholds> {
        no()
    }
    fn threshold_set(&self, _: models::ThresholdRequest) -> Reply<'_, models::Thresholds> {
        Box::pin(async { Ok(models::Thresholds::default()) })
    }
}

impl templates::TemplateControl for Fake {
    fn template_save(&self, _: String, _: templates::TemplateSave) -> Reply<'_, templates::TemplateSaved> {
        no()
    }
    fn templates(&self) -> Reply<'_, templates::TemplateList> {
        no()
    }
    fn template_remove(&self, name: String) -> Reply<'_, ()> {
        Box::pin(async move { if name == "/srv/t/web" { Ok(()) } else { Err(ApiError::not_found(name)) } })
    }
    fn clone_start(&self, _: templates::CloneStart) -> Reply<'_, templates::CloneStarted> {
        no()
    }
}

impl tiers::TierControl for Fake {
    fn cache_resize(&self, request: tiers::ResizeRequest) -> Reply<'_, tiers::Resized> {
        let tier = tiers::TierResized { after_bytes: request.ram_bytes.unwrap_or(0), ..Default::default() };
        Box::pin(async { Ok(tiers::Resized { tiers: vec![tier] }) })
    }
    fn cache_drain(&self, _: tiers::ServiceRequest) -> Reply<'_, tiers::Service> {
        Box::pin(async { Ok(tiers::Service::default()) })
    }
    fn cache_resume(&self, _: tiers::ServiceRequest) -> Reply<'_, tiers::Service> {
        no()
    }
}

impl Control for Fake {
    fn status(&self) -> Reply<'_, Status> {
        Box::pin(async { Ok(Status { version: "1".into(), ..Status::default() }) })
    }
    fn disks(&self) -> Reply<'_, DiskList> {
        Box::pin(async { Ok(DiskList::default()) })
    }
    fn disk(&self, name: String) -> Reply<'_, Disk> {
        Box::pin(async move { Err(ApiError::not_found(format!("there is no disk `{name}`"))) })
    }
    fn disk_add(&self, request: DiskAdd) -> Reply<'_, Disk> {
        Box::pin(async move {
            assert_ne!(request.name, "panic", "as asked");
            Ok(Disk { name: request.name, ..Disk::default() })
        })
    }
    fn disk_resize(&self, disk: String, request: DiskResize) -> Reply<'_, DiskResized> {
        let after_bytes = request.size_bytes.unwrap_or(512);
        Box::pin(async move { Ok(DiskResized { disk, after_bytes, ..DiskResized::default() }) })
    }
    fn disk_remove(&self, _: String, force: bool) -> Reply<'_, ()> {
        Box::pin(async move { if force { Ok(()) } else { Err(ApiError::new(ErrorCode::InUse, "connected")) } })
    }
    fn disk_trace(&self, _: String) -> Reply<'_, Rows> {
        Box::pin(async { Ok(Rows::new(futures_util::stream::iter(["a,b\n", "1,2\n"].map(|row| Ok(row.into()))))) })
    }
    fn disk_history(&self, _: String, since_us: u64) -> Reply<'_, Rows> {
        Box::pin(
            async move { Ok(Rows::new(futures_util::stream::once(async move { Ok(since_us.to_string().into()) }))) },
        )
    }
    fn disk_explain(&self, _: String, offset_bytes: u64) -> Reply<'_, Explained> {
        Box::pin(async move { Ok(Explained { offset_bytes, ..Explained::default() }) })
    }
    fn vms(&self) -> Reply<'_, VmList> {
        no()
    }
    fn vm(&self, vm: String) -> Reply<'_, Vm> {
        Box::pin(async move { Ok(Vm { name: vm, ..Vm::default() }) })
    }
    fn vm_attach(&self, vm: String, target: String, request: AttachRequest) -> Reply<'_, Attached> {
        Box::pin(async move {
            let notes = vec![format!("{request:?}")];
            Ok(Attached { vm, target, notes, ..Attached::default() })
        })
    }
    fn vm_detach(&self, vm: String, target: String) -> Reply<'_, Detached> {
        Box::pin(async move { Ok(Detached { vm, target, ..Detached::default() }) })
    }
    fn cache_tiers(&self) -> Reply<'_, CacheTiers> {
        no()
    }
    fn cache_stat(&self) -> Reply<'_, CacheStat> {
        no()
    }
    fn cache_warm(&self, _: WarmRequest) -> Reply<'_, Warmed> {
        Box::pin(async { Ok(Warmed::default()) })
    }
    fn cache_drop(&self, _: DropRequest) -> Reply<'_, Dropped> {
        Box::pin(async { Ok(Dropped::default()) })
    }
    fn profiles(&self) -> Reply<'_, ProfileList> {
        no()
    }
    fn profile(&self, _: String) -> Reply<'_, Profile> {
        no()
    }
    fn profile_remove(&self, _: String) -> Reply<'_, ()> {
        no()
    }
    fn history(&self) -> Reply<'_, HistoryStatus> {
        Box::pin(async { Ok(HistoryStatus::default()) })
    }
    fn history_runs(&self, query: RunsQuery) -> Reply<'_, RunList> {
        let run = history::Run { program: format!("{query:?}"), ..Default::default() };
        Box::pin(async { Ok(RunList { runs: vec![run] }) })
    }
    fn history_hot(&self, disk: String, query: HotQuery) -> Reply<'_, HotList> {
        Box::pin(async move { Ok(HotList { disk, storage: format!("{query:?}"), ..HotList::default() }) })
    }
    fn history_near(&self, disk: String, query: NearQuery) -> Reply<'_, Near> {
        Box::pin(async move { Ok(Near { disk, storage: format!("{query:?}"), ..Near::default() }) })
    }
    /// Waits in the middle, so that a test can do something meanwhile.
    fn profiles_save(&self) -> Reply<'_, Saved> {
        Box::pin(async {
            self.entered.notify_one();
            self.go_on.notified().await;
            self.finished.notify_one();
            Ok(Saved { profiles: 7, size_bytes: 0 })
        })
    }
}
