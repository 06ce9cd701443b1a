//! Owed pages from a process that stands still to a page store, over real connections on loopback: every page right and
//! once, under faults and push, through cuts, and with peers that lie. Needs a C compiler; fails without one.

mod shared_pages;

use bytes::Bytes;
use migrate::memory::{PAGE_SIZE, PageNumber, PageRange, PageSet, SpaceId};
use migrate::source::send::PagesToSend;
use migrate::source::serve::{Breach, PageServer, ServeError, Serving};
use migrate::target::arrivals::Arrivals;
use migrate::target::page_store::{
    PageRun, PageStore, PageStoreError, PageStoreLimits, RunContent,
};
use migrate::target::pager::{Heard, SupplyLine, SupplyMessage};
use migrate::target::post_copy::{OwingTask, PostCopy, PostCopyError, PostCopying};
use migrate::transport::{
    Connection, Connector, Control, Identity, Listener, PageReceiver, RequestSender, Settings,
    TransportError, TransportThread, TrustStore, TwoWay,
};
use migrate::wire::codec::{Codec, Compression};
use migrate::wire::page_frame::{FrameEncoder, Run, RunKind};
use migrate::wire::page_request::PageRequest;
use migrate::wire::peer_error::PeerError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const BASE: u64 = 0x2000_0000_0000;

/// Two hosts, processes that stand still on one of them, and a store without their pages on the other.
struct Scene {
    _dirs: [TempDir; 2],
    source: TransportThread,
    target: TransportThread,
    listener: Arc<Listener>,
    connector: Connector,
    store: Arc<PageStore>,
    holders: Vec<Holder>,
}

/// A process with memory.
struct Holder {
    /// `None` if it was forked by another one, with which it ends.
    process: Option<Child>,
    pid: i32,
    vpid: i32,
    pages: u64,
    fill: Fill,
}

/// What a holder's pages hold.
#[derive(Clone, Copy)]
struct Fill {
    seed: i32,
    /// Whose pages it shares, all but the 64th part that it wrote anew.
    parent: Option<i32>,
}

/// Both ends of a connection, and what keeps it open.
struct Wire {
    from: Connection,
    to: Connection,
    _controls: [Control; 2],
}

/// The other end of the supply line: takes pages as a pager does.
struct Pager {
    line: SupplyLine,
    memfds: BTreeMap<i32, File>,
    sizes: BTreeMap<i32, u64>,
    fills: BTreeMap<i32, Fill>,
    came: BTreeMap<i32, PageSet>,
    asked_again: u32,
}

impl Scene {
    /// With processes of so many pages, which share nothing.
    fn new(sizes: &[u64]) -> Scene {
        let holders = (1..).zip(sizes);
        let holders = holders.flat_map(|(vpid, &pages)| Holder::start(vpid, pages, 0));
        Scene::with(holders.collect())
    }

    /// With a process of so many pages, and those that it forked.
    fn forked(pages: u64, children: u64) -> Scene {
        Scene::with(Holder::start(1, pages, children))
    }

    fn with(holders: Vec<Holder>) -> Scene {
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let [near, far] = dirs.each_ref().map(|dir| {
            let identity = Identity::load_or_create(dir.path()).expect("an identity");
            (Arc::new(identity), TrustStore::in_dir(dir.path()))
        });
        let name = || "other".parse().expect("a name");
        near.1.add(name(), far.0.fingerprint()).expect("added");
        far.1.add(name(), near.0.fingerprint()).expect("added");
        let source = TransportThread::spawn("source").expect("a thread");
        let target = TransportThread::spawn("target").expect("a thread");
        let listening = target.run(async move {
            let any = "127.0.0.1:0".parse().expect("an address");
            Listener::bind(any, far.0, far.1, Settings::default()).expect("listens")
        });
        let listener = target.handle().block_on(listening).expect("runs");
        Scene {
            _dirs: dirs,
            source,
            target,
            listener: Arc::new(listener),
            connector: Connector::new(near.0, near.1, Settings::default()),
            store: Arc::new(PageStore::new(PageStoreLimits {
                spaces: 8,
                bytes: 1 << 30,
            })),
            holders,
        }
    }

    fn connect(&self) -> Wire {
        let listener = Arc::clone(&self.listener);
        let accepting = self.target.run(async move {
            let arrival = listener.accept().await.expect("somebody knocks");
            arrival.handshake().await.expect("accepts")
        });
        let (connector, addr) = (self.connector.clone(), self.listener.local_addr());
        let addr = addr.expect("has an address");
        let connecting = self
            .source
            .run(async move { connector.connect(addr).await });
        let (from, ask) = self
            .source
            .handle()
            .block_on(connecting)
            .expect("runs")
            .expect("connects");
        let (to, answer) = self.target.handle().block_on(accepting).expect("runs");
        Wire {
            from,
            to,
            _controls: [ask, answer],
        }
    }

    fn server(&self) -> PageServer {
        self.server_with(Compression::Auto)
    }

    fn server_with(&self, compression: Compression) -> PageServer {
        let pages = self.holders.iter().map(Holder::to_send).collect();
        PageServer::new(pages, compression).expect("the processes are there")
    }

    /// One to which the target says what is owed.
    fn server_that_knows_nothing(&self) -> PageServer {
        let processes = self.holders.iter();
        let processes = processes.map(|holder| (holder.space(), holder.pid));
        let processes: Vec<(SpaceId, i32)> = processes.collect();
        PageServer::resume(&processes, Compression::Auto).expect("the processes are there")
    }

    /// Pages of all processes.
    fn pages(&self) -> u64 {
        self.holders.iter().map(|holder| holder.pages).sum()
    }

    /// Makes the store owe everything; gives the agent's part and the pager's.
    fn owing(&self) -> (PostCopy, Pager) {
        let (theirs, line) = SupplyLine::pair().expect("a supply line");
        let mut pager = Pager {
            line: theirs,
            memfds: BTreeMap::new(),
            sizes: BTreeMap::new(),
            fills: BTreeMap::new(),
            came: BTreeMap::new(),
            asked_again: 0,
        };
        let mut tasks = Vec::new();
        for holder in &self.holders {
            let run = PageRun {
                pages: holder.all(),
                content: RunContent::Owed,
            };
            self.store.place(holder.space(), &[run], &[]).expect("owed");
            let memfd = self.store.memfd(holder.space()).expect("a memfd");
            pager.memfds.insert(holder.vpid, memfd.into());
            pager.sizes.insert(holder.vpid, holder.pages);
            pager.fills.insert(holder.vpid, holder.fill);
            tasks.push(OwingTask {
                space: holder.space(),
                vpid: holder.vpid,
                owed: [holder.all()].into_iter().collect(),
                arrivals: Arrivals::new().expect("a record"),
            });
        }
        let post_copy = PostCopy::new(Arc::clone(&self.store), line, tasks).expect("tracked");
        (post_copy, pager)
    }

    /// Both ends went well; nothing is owed, and nothing is left of what the pager took.
    fn ensure_over(&self, serving: Serving, copying: PostCopying, pager: &mut Pager) {
        pager.take_until("the last page", |pager| pager.has_all());
        assert!(
            copying.wait_all_here(PATIENCE),
            "{} pages are missing",
            copying.left()
        );
        copying.wait().1.expect("taken in");
        serving.wait().1.expect("served");
        for holder in &self.holders {
            assert!(self.store.owed(holder.space()).is_empty());
        }
        assert_eq!(
            self.store.memory_in_use().expect("measured"),
            0,
            "a page came again"
        );
    }
}

impl Holder {
    /// A process and its children, whose vpids follow its own.
    fn start(vpid: i32, pages: u64, children: u64) -> Vec<Holder> {
        let mut process = Command::new(holder_program())
            .arg(format!("{BASE:x}"))
            .args([pages, u64::from(vpid.cast_unsigned()), children].map(|arg| arg.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut line = String::new();
        let output = process.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut line).expect("a line");
        let children = line.trim().strip_prefix("ready").expect("it is ready");
        let children = children.split_whitespace();
        let children: Vec<i32> = children.map(|pid| pid.parse().expect("a pid")).collect();
        let first = Holder {
            pid: process.id().cast_signed(),
            process: Some(process),
            vpid,
            pages,
            fill: Fill {
                seed: vpid,
                parent: None,
            },
        };
        let forked = (vpid + 1..).zip(children).map(|(child, pid)| Holder {
            process: None,
            pid,
            vpid: child,
            pages,
            fill: Fill {
                seed: child,
                parent: Some(vpid),
            },
        });
        [first].into_iter().chain(forked).collect()
    }

    fn space(&self) -> SpaceId {
        SpaceId(self.vpid.cast_unsigned() + 10)
    }

    fn all(&self) -> PageRange {
        pages(0, self.pages)
    }

    fn to_send(&self) -> PagesToSend {
        PagesToSend {
            space: self.space(),
            pid: self.pid,
            pages: [self.all()].into_iter().collect(),
        }
    }

    fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("killed");
            process.wait().expect("reaped");
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

impl Fill {
    /// Whether the process wrote this page after it was forked.
    fn is_own(self, index: u64) -> bool {
        self.parent.is_none() || index % 64 == u64::from(self.seed.cast_unsigned()) % 64
    }

    fn page(self, index: u64) -> Vec<u8> {
        let parent = self.parent.filter(|_| !self.is_own(index));
        page_content(parent.unwrap_or(self.seed), index)
    }
}

impl Pager {
    fn want(&self, vpid: i32, pages: PageRange) {
        let said = self.line.send(SupplyMessage::Want { vpid, pages });
        assert!(said.expect("open"), "few wants are under way");
    }

    /// A fault: wants these pages, and takes what comes until the first of them is there.
    fn fault(&mut self, vpid: i32, pages: PageRange) {
        if !self.has(vpid, pages.start()) {
            self.want(vpid, pages);
            self.take_until("a page", |pager| pager.has(vpid, pages.start()));
        }
    }

    fn has(&self, vpid: i32, page: PageNumber) -> bool {
        self.came.get(&vpid).is_some_and(|came| came.contains(page))
    }

    fn has_all(&self) -> bool {
        self.sizes.iter().all(|(vpid, &pages)| {
            self.came
                .get(vpid)
                .is_some_and(|came| came.pages() == pages)
        })
    }

    fn take_until(&mut self, what: &str, enough: impl Fn(&Pager) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !enough(self) {
            assert!(Instant::now() < deadline, "{what} did not come");
            self.take();
        }
    }

    /// Takes what is announced, waiting a little if there is nothing.
    fn take(&mut self) {
        match self.line.receive().expect("a sound line") {
            Heard::Message(SupplyMessage::Came { vpid, pages }) => self.take_pages(vpid, pages),
            Heard::Message(SupplyMessage::AskAgain) => self.asked_again += 1,
            Heard::Message(SupplyMessage::Want { .. }) => panic!("only the pager wants"),
            Heard::End => panic!("the agent has left the line"),
            Heard::Nothing => {
                let mut polled = [PollFd::new(self.line.as_fd(), PollFlags::POLLIN)];
                poll(&mut polled, PollTimeout::from(100u8)).expect("polled");
            }
        }
    }

    /// The pages are there, and right; a pager places them and frees them.
    fn take_pages(&mut self, vpid: i32, announced: PageRange) {
        let came = self.came.entry(vpid).or_default();
        for page in announced.chunks(1) {
            if came.contains(page.start()) {
                continue;
            }
            came.insert(page);
            let offset = page.start().addr().0;
            let mut content = vec![0; PAGE_SIZE as usize];
            let memfd = &self.memfds[&vpid];
            memfd.read_exact_at(&mut content, offset).expect("read");
            let index = page.start().0 - BASE / PAGE_SIZE;
            assert!(
                content == self.fills[&vpid].page(index),
                "page {index} of {vpid} is wrong"
            );
            let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            nix::fcntl::fallocate(memfd, flags, offset.cast_signed(), PAGE_SIZE.cast_signed())
                .expect("punched");
        }
    }
}

/// So many pages, from the so-many-th page of a holder on.
fn pages(index: u64, pages: u64) -> PageRange {
    PageRange::from_start_len(PageNumber(BASE / PAGE_SIZE + index), pages).expect("a range")
}

fn is_zero(index: u64) -> bool {
    index % 7 == 3
}

/// What tests/programs/holder.c fills a page with.
fn page_content(seed: i32, index: u64) -> Vec<u8> {
    let seed = u64::from(seed.cast_unsigned());
    let first = (index + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = |i: u64| match is_zero(index) {
        true => 0,
        false => first.wrapping_add(i.wrapping_mul(0xbf58_476d_1ce4_e5b9)) | 1,
    };
    (0..PAGE_SIZE / 8)
        .flat_map(|i| word(i).to_le_bytes())
        .collect()
}

fn holder_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("holder-{}", std::process::id()));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/holder.c");
        let status = Command::new("cc")
            .args(["-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(source)
            .status()
            .expect("a C compiler");
        assert!(status.success());
        program
    })
}

/// Page numbers in no order, the same every time.
fn scattered(seed: u64, below: u64) -> impl Iterator<Item = u64> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    })
}

#[test]
fn every_page_arrives_right_and_once_under_faults_and_push() {
    let scene = Scene::new(&[9000, 5000]);
    let (wire, server) = (scene.connect(), scene.server());
    let (post_copy, mut pager) = scene.owing();
    let progress = server.progress();
    // Wanted before anything is pushed, and the last to be pushed: however late this thread is, one fault there is.
    pager.want(1, pages(8999, 1));
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    for (step, page) in scattered(7, 4990).take(1500).enumerate() {
        pager.fault(1 + (step % 2) as i32, pages(page, 1 + page % 9));
        // And one that runs through memory.
        pager.fault(1, pages(4000 + 3 * step as u64, 8));
    }
    scene.ensure_over(serving, copying, &mut pager);
    let served = progress.now();
    assert!(served.faults > 0 && served.pushed_pages > 0, "{served:?}");
    assert_eq!(served.pages_left, 0);
    assert!(
        served.pushed_pages + served.answered_pages >= 14_000,
        "{served:?}"
    );
}

#[test]
fn the_bandwidth_limit_holds_for_the_push_and_not_for_faults() {
    let scene = Scene::new(&[4000]);
    let (wire, server) = (scene.connect(), scene.server());
    // One burst of a frame or two, and then nothing for hours.
    wire.from.set_bandwidth_limit(NonZeroU64::new(1));
    let (post_copy, mut pager) = scene.owing();
    let progress = server.progress();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    for page in scattered(3, 4000).take(1000) {
        pager.fault(1, pages(page, 1));
    }
    let served = progress.now();
    assert!(served.faults > 500, "{served:?}");
    assert!(served.pushed_pages <= 32, "{served:?}");
    wire.from.set_bandwidth_limit(None);
    scene.ensure_over(serving, copying, &mut pager);
}

#[test]
fn a_cut_connection_is_replaced_and_both_ends_go_on_where_they_were() {
    cut_again_and_again(&Scene::new(&[12_000, 3000]));
}

fn cut_again_and_again(scene: &Scene) {
    let mut server = scene.server();
    let (mut post_copy, mut pager) = scene.owing();
    let progress = server.progress();
    let mut faults = scattered(11, 3000);
    for cut in 1..=3u32 {
        let wire = scene.connect();
        // 2 MB/s: the end is not reached before the cut, not even when this thread stands still for some seconds.
        wire.from.set_bandwidth_limit(NonZeroU64::new(2_000_000));
        let copying = post_copy.attach(&wire.to);
        let serving = server.attach(&wire.from).expect("a thread");
        pager.take_until("a word after the connection", |pager| {
            pager.asked_again == cut
        });
        let before = copying.left();
        for page in faults.by_ref().take(200) {
            pager.fault(2, pages(page, 2));
        }
        pager.take_until("some push", |_| copying.left() + 600 < before);
        // Wanted just when the link goes: lost, and to be asked for again.
        pager.want(2, pages(2999, 1));
        if cut % 2 == 0 {
            wire.from.close(PeerError::Internal);
        } else {
            wire.to.close(PeerError::Internal);
        }
        let (kept, served) = serving.wait();
        let error = served.expect_err("cut");
        assert!(error.is_transient(), "{error}");
        server = kept;
        let (kept, taken) = copying.wait();
        let error = taken.expect_err("cut");
        assert!(error.is_transient(), "{error}");
        post_copy = kept;
    }
    let left = post_copy.left();
    assert!(left > 0, "there must be something left to go on with");
    let before = progress.now();
    let wire = scene.connect();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    pager.take_until("a word after the connection", |pager| {
        pager.asked_again == 4
    });
    pager.fault(2, pages(2999, 1));
    scene.ensure_over(serving, copying, &mut pager);
    let pushed = progress.now().pushed_pages - before.pushed_pages;
    assert!(
        pushed <= left,
        "{pushed} pages were pushed, {left} were missing"
    );
}

#[test]
fn an_end_that_the_source_did_not_hear_of_is_told_again() {
    let scene = Scene::new(&[500]);
    let wire = scene.connect();
    let (post_copy, mut pager) = scene.owing();
    let copying = post_copy.attach(&wire.to);
    let serving = scene.server().attach(&wire.from).expect("a thread");
    assert!(copying.wait_all_here(PATIENCE));
    let (post_copy, _) = copying.wait();
    let (server, _) = serving.wait();
    // As if Complete had been lost with the connection.
    let wire = scene.connect();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
}

#[test]
fn both_ends_can_be_stopped_and_go_on_later() {
    let scene = Scene::new(&[3000]);
    let wire = scene.connect();
    wire.from.set_bandwidth_limit(NonZeroU64::new(1));
    let (post_copy, mut pager) = scene.owing();
    let copying = post_copy.attach(&wire.to);
    let serving = scene.server().attach(&wire.from).expect("a thread");
    pager.fault(1, pages(2500, 1));
    assert!(!copying.wait_all_here(Duration::ZERO));
    serving.stop();
    let (server, served) = serving.wait();
    assert!(matches!(served, Err(ServeError::Stopped)), "{served:?}");
    let (post_copy, taken) = copying.wait();
    let told = TransportError::ClosedByPeer(PeerError::Cancelled);
    let error = taken.expect_err("the source stopped");
    assert_eq!(error.to_string(), told.to_string());
    let wire = scene.connect();
    let copying = post_copy.attach(&wire.to);
    copying.stop();
    let (post_copy, taken) = copying.wait();
    assert!(matches!(taken, Err(PostCopyError::Stopped)), "{taken:?}");
    let wire = scene.connect();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
}

#[test]
fn a_process_that_is_gone_ends_the_service_and_the_target_is_told() {
    let mut scene = Scene::new(&[3000]);
    let wire = scene.connect();
    let (post_copy, _pager) = scene.owing();
    let server = scene.server();
    scene.holders[0].end();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    let error = serving.wait().1.expect_err("nothing can be read");
    assert!(
        matches!(error, ServeError::Read { .. } | ServeError::Gone { .. }),
        "{error}"
    );
    let (post_copy, taken) = copying.wait();
    let told = PostCopyError::Transport(TransportError::ClosedByPeer(PeerError::Internal));
    assert_eq!(taken.expect_err("told").to_string(), told.to_string());
    assert_eq!(post_copy.left(), 3000);
}

#[test]
fn a_pager_that_leaves_ends_the_target_s_side() {
    let scene = Scene::new(&[300]);
    let wire = scene.connect();
    let (post_copy, pager) = scene.owing();
    drop(pager);
    let copying = post_copy.attach(&wire.to);
    let serving = scene.server().attach(&wire.from).expect("a thread");
    let error = copying.wait().1.expect_err("nobody to tell");
    assert!(matches!(error, PostCopyError::PagerGone), "{error}");
    serving.wait().1.expect_err("the target closed");
}

/// What a target does that lies: it has the first fault stream and says something.
fn lie(scene: &Scene, server: PageServer, said: &[PageRequest]) -> (PageServer, ServeError) {
    let wire = scene.connect();
    let to = wire.to.clone();
    let lies = said.to_vec();
    let lying = scene.target.run(async move {
        let mut streams: Vec<(RequestSender, PageReceiver)> = Vec::new();
        for _ in 0..4 {
            streams.push(to.accept_faults().await.expect("opened"));
        }
        let first = streams.iter_mut().find(|(_, pages)| pages.index() == 0);
        first
            .expect("the first stream")
            .0
            .send(&lies)
            .await
            .expect("said");
        to.closed().await
    });
    let serving = server.attach(&wire.from).expect("a thread");
    let (server, served) = serving.wait();
    let told = scene.target.handle().block_on(lying).expect("runs");
    assert!(
        matches!(told, TransportError::ClosedByPeer(PeerError::Unexpected)),
        "{said:?}: {told}"
    );
    (server, served.expect_err("a lie was believed"))
}

#[test]
fn a_target_that_lies_is_found_out_and_an_honest_one_is_served_afterwards() {
    let scene = Scene::new(&[1000]);
    let space = scene.holders[0].space();
    let missing = |range| PageRequest::Missing {
        space,
        pages: range,
    };
    let want = |space, pages| PageRequest::Want { space, pages };
    let mut server = scene.server();
    type Case = (Vec<PageRequest>, fn(&ServeError) -> bool);
    let cases: Vec<Case> = vec![
        (vec![want(space, pages(1000, 1))], |e| {
            matches!(e, ServeError::Breach(Breach::NotOwed { .. }))
        }),
        (vec![want(space, pages(990, 11))], |e| {
            matches!(e, ServeError::Breach(Breach::NotOwed { .. }))
        }),
        (vec![want(SpaceId(77), pages(0, 1))], |e| {
            matches!(e, ServeError::Breach(Breach::NotOwed { .. }))
        }),
        (vec![missing(pages(10, 991))], |e| {
            matches!(e, ServeError::Breach(Breach::NotOwed { .. }))
        }),
        (vec![missing(pages(10, 10)), missing(pages(15, 2))], |e| {
            matches!(e, ServeError::Breach(Breach::Order { .. }))
        }),
        (vec![missing(pages(0, 999)), PageRequest::MissingEnd], |e| {
            matches!(e, ServeError::Breach(Breach::NeverSent { .. }))
        }),
        (vec![PageRequest::Complete], |e| {
            matches!(e, ServeError::Breach(Breach::OutOfPlace(_)))
        }),
        (vec![PageRequest::Received { bytes: u64::MAX }], |e| {
            matches!(e, ServeError::Credit(_))
        }),
    ];
    for (said, expected) in cases {
        let (kept, error) = lie(&scene, server, &said);
        assert!(expected(&error), "{said:?}: {error}");
        assert!(!error.is_transient());
        server = kept;
    }
    let wire = scene.connect();
    let (post_copy, mut pager) = scene.owing();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
}

#[test]
fn bytes_that_are_no_page_request_are_refused() {
    let scene = Scene::new(&[10]);
    let wire = scene.connect();
    let to = wire.to.clone();
    let lying = scene.target.run(async move {
        let (_, mut send, _receive) = to.accept_stream(TwoWay::Faults).await.expect("opened");
        send.write_all(&[0xff; 24]).await.expect("written");
        to.closed().await
    });
    let serving = scene.server().attach(&wire.from).expect("a thread");
    let error = serving.wait().1.expect_err("nonsense");
    assert!(
        matches!(error, ServeError::Transport(TransportError::PageRequest(_))),
        "{error}"
    );
    let told = scene.target.handle().block_on(lying).expect("runs");
    assert!(
        matches!(told, TransportError::ClosedByPeer(PeerError::Malformed)),
        "{told}"
    );
}

#[test]
fn a_source_that_sends_what_it_does_not_owe_is_found_out_and_an_honest_one_goes_on() {
    let scene = Scene::new(&[1000]);
    let space = scene.holders[0].space();
    let (mut post_copy, mut pager) = scene.owing();
    type Case = (SpaceId, PageRange, RunKind, fn(&PostCopyError) -> bool);
    let cases: Vec<Case> = vec![
        (space, pages(995, 6), RunKind::Data, |e| {
            matches!(e, PostCopyError::Store(PageStoreError::NotOwed { .. }))
        }),
        (space, pages(2000, 1), RunKind::Zero, |e| {
            matches!(e, PostCopyError::Store(PageStoreError::NotOwed { .. }))
        }),
        (space, pages(0, 100), RunKind::Owed, |e| {
            matches!(e, PostCopyError::Store(PageStoreError::NotOwed { .. }))
        }),
        (SpaceId(99), pages(0, 1), RunKind::Data, |e| {
            matches!(e, PostCopyError::UnknownSpace(SpaceId(99)))
        }),
    ];
    for (on_fault_stream, (space, range, kind, expected)) in [false, true]
        .into_iter()
        .flat_map(|on| cases.iter().map(move |case| (on, *case)))
    {
        let wire = scene.connect();
        let from = wire.from.clone();
        let run = Run { range, kind };
        let raw = Bytes::from(vec![7; run.raw_len()]);
        let frame = FrameEncoder::new().encode(space, &[run], raw, Codec::None);
        let frame = frame.expect("encodes");
        let lying = scene.source.run(async move {
            let (mut answers, _requests) = from.open_faults(0).await.expect("opened");
            let mut push = from.open_pages(0).await.expect("opened");
            let stream = if on_fault_stream {
                &mut answers
            } else {
                &mut push
            };
            stream.send(frame).await.expect("sent");
            from.closed().await
        });
        let (kept, taken) = post_copy.attach(&wire.to).wait();
        post_copy = kept;
        let error = taken.expect_err("a lie was believed");
        assert!(expected(&error), "{run:?}: {error}");
        assert!(!error.is_transient());
        let told = scene.source.handle().block_on(lying).expect("runs");
        assert!(
            matches!(told, TransportError::ClosedByPeer(PeerError::Unexpected)),
            "{told}"
        );
        assert_eq!(post_copy.left(), 1000);
    }
    let wire = scene.connect();
    let copying = post_copy.attach(&wire.to);
    let serving = scene.server().attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
}

#[test]
fn a_source_that_opens_streams_without_end_or_ends_them_early_is_refused() {
    let scene = Scene::new(&[100]);
    let (post_copy, _pager) = scene.owing();
    let wire = scene.connect();
    let from = wire.from.clone();
    let lying = scene.source.run(async move {
        let mut streams = Vec::new();
        for index in 0..9 {
            streams.push(from.open_pages(index).await.expect("opened"));
        }
        from.closed().await
    });
    let (post_copy, taken) = post_copy.attach(&wire.to).wait();
    let error = taken.expect_err("too many");
    assert!(matches!(error, PostCopyError::TooManyStreams), "{error}");
    scene.source.handle().block_on(lying).expect("runs");
    for on_fault_stream in [false, true] {
        let wire = scene.connect();
        let from = wire.from.clone();
        let lying = scene.source.run(async move {
            let (mut answers, _requests) = from.open_faults(0).await.expect("opened");
            let mut push = from.open_pages(0).await.expect("opened");
            let stream = if on_fault_stream {
                &mut answers
            } else {
                &mut push
            };
            stream.finish().expect("finished once");
            from.closed().await
        });
        let (kept, taken) = post_copy_again(&scene, &wire);
        drop(kept);
        let error = taken.expect_err("nothing has come");
        assert!(matches!(error, PostCopyError::EndedEarly(100)), "{error}");
        scene.source.handle().block_on(lying).expect("runs");
    }
    assert_eq!(post_copy.left(), 100);
}

/// Another agent with the same store: what has not arrived is still owed.
fn post_copy_again(scene: &Scene, wire: &Wire) -> (PostCopy, Result<(), PostCopyError>) {
    let (theirs, line) = SupplyLine::pair().expect("a supply line");
    let holder = &scene.holders[0];
    let task = OwingTask {
        space: holder.space(),
        vpid: holder.vpid,
        owed: [holder.all()].into_iter().collect(),
        arrivals: Arrivals::new().expect("a record"),
    };
    let post_copy = PostCopy::new(Arc::clone(&scene.store), line, vec![task]).expect("tracked");
    let taken = post_copy.attach(&wire.to).wait();
    drop(theirs);
    taken
}
