//! Pages that forked processes share, in post-copy: pushed once, right in every process, and only what came last is
//! believed to be another's.

use super::*;
use migrate::wire::page_frame::EncodedFrame;

#[test]
fn what_forked_processes_share_is_pushed_once() {
    for codec in [Codec::None, Codec::Lz4] {
        let scene = Scene::forked(6400, 4);
        let (wire, server) = (
            scene.connect(),
            scene.server_with(Compression::Always(codec)),
        );
        let (post_copy, mut pager) = scene.owing();
        let progress = server.progress();
        let copying = post_copy.attach(&wire.to);
        let serving = server.attach(&wire.from).expect("a thread");
        scene.ensure_over(serving, copying, &mut pager);
        let served = progress.now();
        let mut own = 0;
        let mut shared = 0;
        for holder in &scene.holders {
            let data = || (0..holder.pages).filter(|&index| !is_zero(index));
            let written = data().filter(|&index| holder.fill.is_own(index)).count() as u64;
            own += written;
            shared += data().count() as u64 - written;
        }
        assert_eq!(served.pushed_pages, scene.pages(), "{served:?}");
        assert!(
            served.same_pages <= shared,
            "{shared} are shared: {served:?}"
        );
        // The kernel may move a page just between two looks.
        assert!(
            served.same_pages > shared * 99 / 100,
            "{shared} are shared: {served:?}"
        );
        let most = own * PAGE_SIZE * 105 / 100;
        assert!(
            served.pushed_bytes < most,
            "{own} pages once are less: {served:?}"
        );
    }
}

#[test]
fn shared_pages_arrive_right_and_once_under_faults_in_all_processes() {
    let scene = Scene::forked(5000, 3);
    let (wire, server) = (scene.connect(), scene.server());
    let (post_copy, mut pager) = scene.owing();
    let progress = server.progress();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    for (step, page) in scattered(13, 4990).take(1000).enumerate() {
        pager.fault(1 + (step % 4) as i32, pages(page, 1 + page % 9));
    }
    scene.ensure_over(serving, copying, &mut pager);
    let served = progress.now();
    assert!(served.faults > 0 && served.same_pages > 0, "{served:?}");
}

#[test]
fn both_ends_go_on_after_a_cut_when_pages_are_shared() {
    cut_again_and_again(&Scene::forked(12_000, 2));
}

/// What the source's stream is cut behind: it has named the others' pages, or was about to.
#[test]
fn what_was_named_before_a_cut_and_not_heard_of_is_sent_again() {
    let scene = Scene::forked(4000, 3);
    let server = scene.server();
    let progress = server.progress();
    let wire = scene.connect();
    let missing = scene.holders.iter().map(|holder| PageRequest::Missing {
        space: holder.space(),
        pages: holder.all(),
    });
    let missing: Vec<PageRequest> = missing.chain([PageRequest::MissingEnd]).collect();
    let to = wire.to.clone();
    let cut = scene.target.run(async move {
        let mut streams = Vec::new();
        for _ in 0..4 {
            streams.push(to.accept_faults().await.expect("opened"));
        }
        let first = streams.iter_mut().find(|(_, pages)| pages.index() == 0);
        let (requests, _) = first.expect("the first stream");
        requests.send(&missing).await.expect("said");
        let mut push = to.accept_pages().await.expect("opened");
        let frame = push.receive().await.expect("sound").expect("a frame");
        to.close(PeerError::Internal);
        frame
    });
    let serving = server.attach(&wire.from).expect("a thread");
    let frame = scene.target.handle().block_on(cut).expect("runs");
    assert_eq!(frame.space(), scene.holders[0].space());
    let (server, served) = serving.wait();
    assert!(served.expect_err("cut").is_transient());
    let before = progress.now();

    let wire = scene.connect();
    let (post_copy, mut pager) = scene.owing();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
    let served = progress.now();
    assert_eq!(served.pushed_pages - before.pushed_pages, scene.pages());
}

/// The first process's pages have come, and the frame that names them for the others has not.
#[test]
fn what_was_not_named_before_a_cut_is_shared_by_those_who_miss_it() {
    let scene = Scene::forked(2000, 3);
    let (post_copy, mut pager) = scene.owing();
    let wire = scene.connect();
    let first = &scene.holders[0];
    // No page of zeros, none that a child wrote.
    let came = pages(11, 6);
    let frame = data_frame(first, came);
    let from = wire.from.clone();
    let sending = scene.source.run(async move {
        let mut push = from.open_pages(0).await.expect("opened");
        push.send(frame).await.expect("sent");
        push
    });
    let copying = post_copy.attach(&wire.to);
    pager.take_until("the frame", |pager| {
        pager.came.get(&1).is_some_and(|came| came.pages() == 6)
    });
    wire.from.close(PeerError::Internal);
    scene.source.handle().block_on(sending).expect("runs");
    let (post_copy, taken) = copying.wait();
    assert!(taken.expect_err("cut").is_transient());
    assert_eq!(post_copy.left(), scene.pages() - 6);

    let wire = scene.connect();
    let server = scene.server_that_knows_nothing();
    let progress = server.progress();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
    assert_eq!(progress.now().pushed_pages, scene.pages() - 6);
}

/// Data of a holder's pages, none of which is zero.
fn data_frame(holder: &Holder, range: PageRange) -> EncodedFrame {
    let content = range.chunks(1).flat_map(|page| {
        let index = page.start().0 - BASE / PAGE_SIZE;
        holder.fill.page(index)
    });
    encode(holder.space(), &[(range, RunKind::Data)], content.collect())
}

fn encode(space: SpaceId, runs: &[(PageRange, RunKind)], raw: Bytes) -> EncodedFrame {
    let run = |&(range, kind)| Run { range, kind };
    let runs: Vec<Run> = runs.iter().map(run).collect();
    let encoded = FrameEncoder::new().encode(space, &runs, raw, Codec::None);
    encoded.expect("encodes")
}

/// Where a source that lies sends a frame.
#[derive(Clone, Copy)]
enum Stream {
    Push,
    OtherPush,
    Faults,
}

#[test]
fn only_the_last_data_of_the_same_push_stream_is_taken_for_another_s() {
    use Stream::{Faults, OtherPush, Push};
    let scene = Scene::new(&[1000, 900, 1000]);
    let (one, two) = (&scene.holders[0], &scene.holders[1]);
    let (two_space, three_space) = (two.space(), scene.holders[2].space());
    let same = RunKind::Same(one.space());
    let data = |range| data_frame(one, range);
    let named = |range| encode(two_space, &[(range, same)], Bytes::new());
    let not_in_hand = |e: &PostCopyError| matches!(e, PostCopyError::NotInHand { .. });
    let not_owed =
        |e: &PostCopyError| matches!(e, PostCopyError::Store(PageStoreError::NotOwed { .. }));
    type Case = (
        &'static str,
        Vec<(Stream, EncodedFrame)>,
        fn(&PostCopyError) -> bool,
    );
    let cases: Vec<Case> = vec![
        (
            "nothing came before",
            vec![(Push, named(pages(4, 2)))],
            not_in_hand,
        ),
        (
            "other data came since",
            vec![
                (Push, data(pages(4, 2))),
                (Push, data(pages(6, 2))),
                (Push, named(pages(4, 2))),
            ],
            not_in_hand,
        ),
        (
            "one page more than came",
            vec![(Push, data(pages(11, 3))), (Push, named(pages(11, 4)))],
            not_in_hand,
        ),
        (
            "a page that came as zeros",
            vec![
                (Push, {
                    let zero = (pages(17, 1), RunKind::Zero);
                    let content = one.fill.page(16).into();
                    encode(one.space(), &[(pages(16, 1), RunKind::Data), zero], content)
                }),
                (Push, named(pages(16, 2))),
            ],
            not_in_hand,
        ),
        (
            "another space than came",
            vec![
                (Push, data(pages(18, 2))),
                (Push, {
                    let same = RunKind::Same(three_space);
                    encode(two_space, &[(pages(18, 2), same)], Bytes::new())
                }),
            ],
            not_in_hand,
        ),
        (
            "in a frame with data of its own",
            vec![
                (Push, data(pages(25, 2))),
                (Push, {
                    let own = (pages(27, 1), RunKind::Data);
                    let content = two.fill.page(27).into();
                    encode(two_space, &[(pages(25, 2), same), own], content)
                }),
            ],
            not_in_hand,
        ),
        (
            "data on another stream",
            vec![(Push, data(pages(32, 2))), (OtherPush, named(pages(32, 2)))],
            not_in_hand,
        ),
        (
            "on a fault stream",
            vec![(Push, data(pages(39, 2))), (Faults, named(pages(39, 2)))],
            not_owed,
        ),
        (
            "pages that are not owed",
            vec![(Push, data(pages(904, 2))), (Push, named(pages(904, 2)))],
            not_owed,
        ),
        (
            "a space that owes nothing",
            vec![
                (Push, data(pages(46, 2))),
                (
                    Push,
                    encode(SpaceId(99), &[(pages(46, 2), same)], Bytes::new()),
                ),
            ],
            |e| matches!(e, PostCopyError::UnknownSpace(SpaceId(99))),
        ),
    ];
    let (mut post_copy, mut pager) = scene.owing();
    for (lie, frames, expected) in cases {
        let wire = scene.connect();
        let from = wire.from.clone();
        let lying = scene.source.run(async move {
            let (mut answers, _requests) = from.open_faults(0).await.expect("opened");
            let mut push = from.open_pages(0).await.expect("opened");
            let mut other_push = from.open_pages(1).await.expect("opened");
            let mut lying_on = None;
            for (stream, frame) in frames {
                let stream = match stream {
                    Push => &mut push,
                    OtherPush => &mut other_push,
                    Faults => &mut answers,
                };
                stream.send(frame).await.expect("sent");
                lying_on = Some(stream);
            }
            // Were the lie believed, this would end it.
            let _ = lying_on.expect("some frame").finish();
            from.closed().await
        });
        let (kept, taken) = post_copy.attach(&wire.to).wait();
        post_copy = kept;
        let error = taken.expect_err("a lie was believed");
        assert!(expected(&error), "{lie}: {error}");
        assert!(!error.is_transient());
        let told = scene.source.handle().block_on(lying).expect("runs");
        assert!(
            matches!(told, TransportError::ClosedByPeer(PeerError::Unexpected)),
            "{lie}: {told}"
        );
        assert_eq!(scene.store.owed(two_space).pages(), 900, "{lie}");
    }
    // Whatever came was true: an honest source goes on with the rest.
    let wire = scene.connect();
    let server = scene.server_that_knows_nothing();
    let copying = post_copy.attach(&wire.to);
    let serving = server.attach(&wire.from).expect("a thread");
    scene.ensure_over(serving, copying, &mut pager);
}
