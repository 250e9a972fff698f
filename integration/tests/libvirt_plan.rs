//! Attach and detach on domain definitions: fixtures as libvirt 11.3 writes them, and generated ones.
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use prestage_integration::libvirt::{
    AttachOptions, NAMESPACE, NbdEndpoint, PlanError, StoreSource, plan_attach, plan_detach,
};
use proptest::prelude::*;
use roxmltree::{Document, Node};

const WEB: &str = include_str!("../testdata/domain-web.xml");
const DB: &str = include_str!("../testdata/domain-db.xml");
const SOCKET: &str = "/run/prestage/vm/web/vda.sock";

fn no_volumes(pool: &str, volume: &str) -> Result<StoreSource, String> {
    Err(format!("no pool here for {pool}/{volume}"))
}

fn shared() -> AttachOptions {
    AttachOptions { enable_shared_memory: true, ..AttachOptions::default() }
}

fn attach(
    xml: &str,
    target: &str,
    options: &AttachOptions,
) -> Result<prestage_integration::libvirt::AttachPlan, PlanError> {
    plan_attach(xml, target, Path::new(SOCKET), options, &no_volumes)
}

fn disk<'a, 'i>(doc: &'a Document<'i>, target: &str) -> Node<'a, 'i> {
    let has_target =
        |d: &Node<'_, '_>| d.children().any(|t| t.has_tag_name("target") && t.attribute("dev") == Some(target));
    doc.descendants().find(|n| n.has_tag_name("disk") && has_target(n)).expect("the disk is there")
}

#[test]
fn an_attached_disk_keeps_what_identifies_it_and_drops_what_vhost_user_lacks() {
    let plan = attach(WEB, "vda", &AttachOptions { queues: Some(4), ..shared() }).unwrap();
    let doc = Document::parse(&plan.new_xml).unwrap();
    let vda = disk(&doc, "vda");
    let expected = "<disk type='vhostuser' device='disk' snapshot='no'>
      <driver name='qemu' type='raw' queues='4'/>
      <source type='unix' path='/run/prestage/vm/web/vda.sock'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
      <alias name='ua-root'/>
      <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/>
    </disk>";
    assert_eq!(&plan.new_xml[vda.range()], expected);
    assert_eq!(plan.vm, "web");
    assert_eq!(plan.store, StoreSource::File("/var/lib/libvirt/images/web & mail.img".into()));
    assert_eq!(plan.serial.as_deref(), Some("WEB-ROOT"));
    assert!(!plan.read_only);
    assert!(plan.shared_memory_added);
    assert_eq!(plan.remarks.len(), 2, "I/O limits and error policy: {:?}", plan.remarks);
    assert_eq!(plan.original, &WEB[disk(&Document::parse(WEB).unwrap(), "vda").range()]);
}

#[test]
fn queues_and_model_of_the_definition_stay_unless_given() {
    let plan = attach(WEB, "vda", &shared()).unwrap();
    assert!(plan.new_xml.contains("<driver name='qemu' type='raw' queues='2'/>"));
    let plan = attach(DB, "vda", &AttachOptions { reconnect_secs: 3, ..AttachOptions::default() }).unwrap();
    assert!(plan.new_xml.contains("<disk type='vhostuser' device='disk' model='virtio-transitional' snapshot='no'>"));
    assert!(plan.new_xml.contains("<reconnect enabled='yes' timeout='3'/>"));
    assert_eq!(plan.store, StoreSource::Block("/dev/loop7".into()));
    assert!(!plan.shared_memory_added);
}

#[test]
fn an_nbd_disk_gives_its_uri_and_a_read_only_disk_says_so() {
    let plan = attach(WEB, "vdb", &shared()).unwrap();
    assert!(plan.read_only);
    assert_eq!(plan.store.to_string(), "nbd+unix:///data?socket=/run/nbd/web.sock");
    let StoreSource::Nbd(uri) = plan.store else { panic!("not NBD") };
    assert_eq!(uri.endpoint, NbdEndpoint::Unix("/run/nbd/web.sock".into()));
    assert!(!plan.new_xml[disk(&Document::parse(&plan.new_xml).unwrap(), "vdb").range()].contains("readonly"));
}

#[test]
fn a_pool_volume_is_resolved() {
    let volumes = |pool: &str, volume: &str| {
        assert_eq!((pool, volume), ("images", "extra.img"));
        Ok(StoreSource::File("/pool/extra.img".into()))
    };
    let plan = plan_attach(DB, "vdd", Path::new(SOCKET), &AttachOptions::default(), &volumes).unwrap();
    assert_eq!(plan.store, StoreSource::File("/pool/extra.img".into()));
    assert!(matches!(attach(DB, "vdd", &shared()), Err(PlanError::Volume { .. })));
}

#[test]
fn all_but_the_disk_the_memory_and_the_metadata_stays_byte_for_byte() {
    let plan = attach(WEB, "vda", &shared()).unwrap();
    let lines: Vec<&str> = plan.new_xml.lines().collect();
    // Every line of the original outside the disk element is still there, in order.
    let replaced: Vec<&str> = plan.original.lines().collect();
    let mut rest = lines.iter();
    for line in WEB.lines().filter(|l| !replaced.iter().any(|r| r.trim() == l.trim())) {
        assert!(rest.any(|l| *l == line), "missing: {line}");
    }
    assert!(plan.new_xml.contains(&format!("<prestage:attach xmlns:prestage=\"{NAMESPACE}\">")));
    assert!(plan.new_xml.contains("passwd='s3cret'"));
}

#[test]
fn refusals_name_the_disk_and_the_way_out() {
    let cases = [
        (WEB, "vdz", "there is no disk `vdz`; this VM's disks: vda, vdb, sda"),
        (WEB, "sda", "is a cdrom"),
        (DB, "sda", "is on the scsi bus"),
        (DB, "vdc", "read over rbd: only NBD"),
    ];
    let vmdk = DB.replace("type='qcow2'", "type='vmdk'");
    let error = attach(&vmdk, "vdb", &shared()).unwrap_err().to_string();
    assert!(error.contains("--format=vmdk --socket=/run/vdb.nbd /var/lib/libvirt/images/db.qcow2"), "{error}");
    for (xml, target, text) in cases {
        let error = attach(xml, target, &shared()).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let error = attach(WEB, "vda", &AttachOptions::default()).unwrap_err();
    assert_eq!(error, PlanError::MemoryNotShared);
    let error = error.to_string();
    assert!(error.contains("<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"), "{error}");
    assert!(error.contains("--enable-shared-memory"), "{error}");
}

#[test]
fn a_qcow2_disk_is_its_image_with_what_the_definition_names_below() {
    let plan = attach(DB, "vdb", &shared()).unwrap();
    assert_eq!(plan.store.to_string(), "qcow2:/var/lib/libvirt/images/db.qcow2");
    assert!(plan.new_xml.contains("<driver name='qemu' type='raw'"), "the guest sees a raw disk");
    let below = |inner: &str| {
        let driver = "<driver name='qemu' type='qcow2'/><source file='/a b.qcow2'/>";
        let xml = one_disk("type='file' device='disk'", &format!("{driver}{inner}"));
        attach(&xml, "vda", &AttachOptions::default()).map(|plan| plan.store.to_string())
    };
    let raw =
        "<backingStore type='block'><format type='raw'/><source dev='/dev/vg/base'/><backingStore/></backingStore>";
    let image = |inner: &str| {
        format!("<backingStore type='file'><format type='qcow2'/><source file='/b'/>{inner}</backingStore>")
    };
    assert_eq!(below("").unwrap(), "qcow2:/a%20b.qcow2");
    assert_eq!(below("<backingStore/>").unwrap(), "qcow2:/a%20b.qcow2");
    assert_eq!(below(&image(raw)).unwrap(), "qcow2:/a%20b.qcow2?backing=qcow2:/b?backing=/dev/vg/base");
    let nbd = "<backingStore type='network'><format type='raw'/><source protocol='nbd' name='x'><host name='h'/></source>\
               <backingStore/></backingStore>";
    assert_eq!(below(nbd).unwrap(), "qcow2:/a%20b.qcow2?backing=nbd://h/x");
    let refused = |inner: &str| assert!(matches!(below(inner), Err(PlanError::Source { .. })), "{inner}");
    refused("<backingStore type='file'><format type='vmdk'/><source file='/b'/></backingStore>");
    refused("<backingStore type='file'><format type='raw'/></backingStore>");
    refused("<backingStore type='file'><format type='raw'/><source file='relative'/></backingStore>");
    refused(&(0..17).fold(String::new(), |inner, _| image(&inner)));
}

/// A domain with one virtio disk, in which `disk` replaces the inner text and `attributes` the attributes.
fn one_disk(attributes: &str, inner: &str) -> String {
    format!(
        "<domain type='kvm'>\n  <name>n</name>\n  <memory>1</memory>\n  <memoryBacking>\n    <access mode='shared'/>\n  \
         </memoryBacking>\n  <devices>\n    <disk {attributes}>\n      {inner}\n      <target dev='vda' bus='virtio'/>\n    \
         </disk>\n  </devices>\n</domain>\n"
    )
}

#[test]
fn disks_that_an_export_cannot_stand_in_for_are_refused() {
    type Check = fn(&PlanError) -> bool;
    let file = "type='file' device='disk'";
    let cases: [(&str, &str, Check); 16] = [
        (
            file,
            "<source file='/a'/><backingStore type='file'><format type='raw'/><source file='/b'/></backingStore>",
            |e| matches!(e, PlanError::BackingStore { .. }),
        ),
        (file, "<source file='/a'><encryption format='luks'/></source>", |e| matches!(e, PlanError::Encrypted { .. })),
        (file, "<source file='/a'/><encryption format='luks'/>", |e| matches!(e, PlanError::Encrypted { .. })),
        (file, "<source file='/a'/><shareable/>", |e| matches!(e, PlanError::Shareable { .. })),
        (file, "<source file='/a'/><transient/>", |e| matches!(e, PlanError::Transient { .. })),
        (file, "<source file='/a'><slices><slice type='storage' offset='0' size='512'/></slices></source>", |e| {
            matches!(e, PlanError::PartialSource { .. })
        }),
        (file, "<source file='/a'/><blockio logical_block_size='4096'/>", |e| {
            matches!(e, PlanError::SectorSize { .. })
        }),
        (file, "<driver name='qemu' type='raw' iommu='on'/><source file='/a'/>", |e| {
            matches!(e, PlanError::Iommu { .. })
        }),
        (file, "", |e| matches!(e, PlanError::NoSource { .. })),
        (file, "<source/>", |e| matches!(e, PlanError::NoSource { .. })),
        ("type='block' device='lun'", "<source dev='/dev/sdb'/>", |e| matches!(e, PlanError::NotADisk { .. })),
        ("type='nvme' device='disk'", "<source type='pci'/>", |e| matches!(e, PlanError::SourceKind { .. })),
        ("type='vhostuser' device='disk'", "<source type='unix' path='/other'/>", |e| {
            matches!(e, PlanError::ForeignVhostUser { .. })
        }),
        ("type='network' device='disk'", "<source protocol='nbd' tls='yes'><host name='h'/></source>", |e| {
            matches!(e, PlanError::Source { .. })
        }),
        ("type='network' device='disk'", "<source protocol='https' name='x'><host name='h'/></source>", |e| {
            matches!(e, PlanError::Protocol { .. })
        }),
        ("type='network' device='disk'", "<source protocol='nbd'/>", |e| matches!(e, PlanError::Source { .. })),
    ];
    for (attributes, inner, expected) in cases {
        let error = attach(&one_disk(attributes, inner), "vda", &shared()).unwrap_err();
        assert!(expected(&error), "{attributes} {inner}: {error}");
        assert!(error.to_string().contains("vda"), "{error}");
    }
    // What looks alike but is fine.
    for inner in [
        "<source file='/a'/><backingStore/>",
        "<source file='/a'/><readonly/><shareable/>",
        "<source file='/a'/><blockio logical_block_size='512' physical_block_size='4096'/>",
    ] {
        attach(&one_disk(file, inner), "vda", &shared()).unwrap();
    }
}

#[test]
fn what_is_no_domain_is_refused() {
    for xml in
        ["", "<", "<domain/>", "<network/>", "<domain type='lxc'><name>c</name></domain>", "<domain type='kvm'/>"]
    {
        let error = attach(xml, "vda", &shared()).unwrap_err();
        assert!(matches!(error, PlanError::BadXml { .. } | PlanError::NotQemu { .. }), "{xml}: {error}");
        assert!(plan_detach(xml, "vda").is_err());
    }
    // Entities of a document type could grow without bound: no document types.
    let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><domain type='kvm'><name>&a;</name></domain>";
    assert!(matches!(attach(bomb, "vda", &shared()), Err(PlanError::BadXml { .. })));
}

#[test]
fn unusable_sockets_and_queue_counts_are_refused() {
    let long = format!("/{}", "x".repeat(107));
    for socket in ["relative.sock", "", long.as_str(), "/a\nb"] {
        let error = plan_attach(WEB, "vda", Path::new(socket), &shared(), &no_volumes).unwrap_err();
        assert!(matches!(error, PlanError::SocketPath { .. }), "{socket}: {error}");
    }
    for queues in [0, 257] {
        let error = attach(WEB, "vda", &AttachOptions { queues: Some(queues), ..shared() }).unwrap_err();
        assert_eq!(error, PlanError::Queues { queues });
    }
}

#[test]
fn a_second_attach_and_a_second_detach_are_refused() {
    let attached = attach(WEB, "vda", &shared()).unwrap().new_xml;
    let error = attach(&attached, "vda", &shared()).unwrap_err();
    assert_eq!(error, PlanError::AlreadyAttached { target: "vda".into(), socket: SOCKET.into() });
    let error = plan_detach(&attached, "vdb").unwrap_err();
    assert_eq!(error, PlanError::NotAttached { target: "vdb".into(), attached: vec!["vda".into()] });
    let detached = plan_detach(&attached, "vda").unwrap().new_xml;
    assert!(matches!(plan_detach(&detached, "vda"), Err(PlanError::NotAttached { .. })));
    assert!(matches!(plan_detach(&detached, "vdz"), Err(PlanError::NoSuchDisk { .. })));
}

#[test]
fn a_disk_changed_by_hand_is_left_alone_by_detach_and_can_be_attached_again() {
    let first = attach(WEB, "vda", &shared()).unwrap();
    // The operator put the old disk back with `virsh edit`; the record is still there.
    let doc = Document::parse(&first.new_xml).unwrap();
    let mut by_hand = first.new_xml.clone();
    by_hand.replace_range(disk(&doc, "vda").range(), &first.original);
    let again = attach(&by_hand, "vda", &shared()).unwrap();
    assert_eq!(again.new_xml.matches("<prestage:disk ").count(), 1);
    assert_eq!(plan_detach(&again.new_xml, "vda").unwrap().new_xml, WEB);

    let plan = plan_detach(&by_hand, "vda").unwrap();
    assert_eq!(plan.original, None);
    assert!(plan.remarks[0].contains("changed by hand"), "{:?}", plan.remarks);
    assert_eq!(plan.new_xml, WEB);

    // And with the disk gone altogether.
    let mut removed = first.new_xml.clone();
    removed.replace_range(disk(&doc, "vda").range(), "");
    let plan = plan_detach(&removed, "vda").unwrap();
    assert!(plan.remarks[0].contains("removed"), "{:?}", plan.remarks);
    assert!(!plan.new_xml.contains(NAMESPACE));
}

#[test]
fn a_damaged_record_is_an_error_not_a_broken_domain() {
    let attached = attach(WEB, "vda", &shared()).unwrap().new_xml;
    let start = attached.find("<prestage:original>").unwrap() + "<prestage:original>".len();
    let end = attached.find("</prestage:original>").unwrap();
    for damage in ["", "nonsense", "&lt;disk", "&lt;disk/&gt;", "&lt;disk&gt;&lt;target dev='vdq'/&gt;&lt;/disk&gt;"] {
        let mut xml = attached.clone();
        xml.replace_range(start..end, damage);
        let error = plan_detach(&xml, "vda").unwrap_err();
        assert!(matches!(error, PlanError::Record { .. }), "{damage}: {error}");
        assert!(error.to_string().contains("virsh edit"));
    }
}

#[test]
fn shared_memory_goes_with_the_last_attached_disk() {
    let one = attach(WEB, "vda", &shared()).unwrap().new_xml;
    let two = attach(&one, "vdb", &AttachOptions::default()).unwrap();
    assert!(!two.shared_memory_added);
    let one_left = plan_detach(&two.new_xml, "vda").unwrap().new_xml;
    assert!(one_left.contains("<access mode='shared'/>"));
    assert_eq!(plan_detach(&one_left, "vdb").unwrap().new_xml, WEB);
}

/// An inner element of a disk that attach accepts.
fn disk_parts() -> impl Strategy<Value = String> {
    let optional = |text: &'static str| prop_oneof![Just(""), Just(text)];
    (
        prop_oneof![
            Just(""),
            Just("<driver name='qemu' type='raw'/>"),
            Just("<driver name='qemu' type='raw' cache='none' io='native' queues='3' packed='on' iothread='1'/>"),
        ],
        "[ -~äß\\n]{1,20}",
        optional("<serial>S &amp; 1</serial>"),
        optional("<!-- a comment > with <odd> text -->"),
        optional("<boot order='2'/>"),
        optional("<address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/>"),
        optional("<readonly/>"),
    )
        .prop_map(|(driver, path, serial, comment, boot, address, readonly)| {
            let path = path
                .replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('\'', "&apos;")
                .replace('"', "&quot;")
                .replace('\n', "&#10;");
            format!("{driver}{comment}<source file='/{path}'/>{serial}\n{boot}{address}{readonly}")
        })
}

fn domains() -> impl Strategy<Value = (String, Vec<String>)> {
    let metadata = prop_oneof![
        Just(""),
        Just("\n  <metadata>\n    <x:y xmlns:x='urn:x'><x:z/></x:y>\n  </metadata>"),
        Just("\n  <metadata><x:y xmlns:x='urn:x'/></metadata>"),
    ];
    let memory = prop_oneof![
        Just(""),
        Just("<memoryBacking/>"),
        Just("<memoryBacking>\n    <hugepages/>\n  </memoryBacking>"),
        Just("<memoryBacking><source type='anonymous'/><access mode='private'/><locked/></memoryBacking>"),
        Just("<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"),
    ];
    let uuid = prop_oneof![Just(""), Just("\n<uuid>5f0a3a1e-6b0e-4f8a-9e4b-1d2c3b4a5f60</uuid>")];
    (metadata, memory, uuid, prop::collection::vec(disk_parts(), 1..4), any::<bool>()).prop_map(
        |(metadata, memory, uuid, disks, pretty)| {
            let gap = if pretty { "\n    " } else { "" };
            let targets: Vec<String> = (0..disks.len()).map(|i| format!("vd{}", char::from(b'a' + i as u8))).collect();
            let disks: String = disks
                .iter()
                .zip(&targets)
                .map(|(inner, t)| {
                    format!("{gap}<disk type='file' device='disk'>{gap}{inner}{gap}<target dev='{t}' bus='virtio'/>{gap}</disk>")
                })
                .collect();
            let xml = format!(
                "<domain type='kvm'>{gap}<name>n</name>{uuid}{metadata}\n  <memory>1</memory>{memory}{gap}<devices>{disks}{gap}\
                 <emulator>/q</emulator></devices>\n</domain>"
            );
            (xml, targets)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is attached in whatever order, detaching gives the very same definition back.
    #[test]
    fn detach_undoes_attach((xml, targets) in domains(), order in any::<prop::sample::Index>()) {
        let mut now = xml.clone();
        for target in &targets {
            let plan = attach(&now, target, &shared()).unwrap();
            Document::parse(&plan.new_xml).unwrap();
            prop_assert!(now.contains(&plan.original));
            now = plan.new_xml;
        }
        let mut left = targets;
        while !left.is_empty() {
            let target = left.remove(order.index(left.len()));
            let plan = plan_detach(&now, &target).unwrap();
            prop_assert!(plan.original.is_some());
            prop_assert_eq!(plan.remarks.len(), 0);
            now = plan.new_xml;
        }
        prop_assert_eq!(now, xml);
    }

    /// Damaged definitions are errors, never panics.
    #[test]
    fn damaged_definitions_do_not_panic(cut in any::<prop::sample::Index>(), with in "[<>/='a-z ]{0,6}", attached in any::<bool>()) {
        let mut xml = if attached { attach(WEB, "vda", &shared()).unwrap().new_xml } else { WEB.to_owned() };
        let at = cut.index(xml.len());
        prop_assume!(xml.is_char_boundary(at));
        xml.insert_str(at, &with);
        let _ = attach(&xml, "vda", &shared());
        let _ = plan_detach(&xml, "vda");
        xml.truncate(at);
        let _ = attach(&xml, "vda", &shared());
    }
}
