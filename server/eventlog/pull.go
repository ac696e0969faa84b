package eventlog

import (
	"context"
	"math/rand/v2"
	"time"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// Pauses between two tries to reach a node.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 3 * time.Second
)

// target is where a session's events come from.
type target struct {
	node       string
	session    string
	generation uint64
}

// pulled is one message of a node, or the failure of one try to reach it.
type pulled struct {
	position *nodev1.RingPosition
	events   []*nodev1.RingEvent
	err      error
}

// puller reads a node's events, and connects again whenever that ends.
type puller struct {
	target target
	out    chan pulled
	cancel context.CancelFunc
	done   chan struct{}

	old uint64 // number of the node's newest event when it was first reached; the feed's
}

func startPuller(ctx context.Context, l *Log, t target, after uint64) *puller {
	ctx, cancel := context.WithCancel(ctx)
	p := &puller{target: t, out: make(chan pulled), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.run(ctx, l, after)
	}()
	return p
}

// stop waits until the puller has ended. What it could not hand over is read again.
func (p *puller) stop() {
	p.cancel()
	<-p.done
}

func (p *puller) run(ctx context.Context, l *Log, after uint64) {
	pause := firstPause
	for {
		began := after
		err := p.stream(ctx, l, &after)
		if ctx.Err() != nil {
			return
		}
		if after != began {
			pause = firstPause
		}
		l.log.DebugContext(ctx, "a session's events cannot be read from its node", "session", p.target.session, "node", p.target.node, "error", err, "retry_in", pause)
		if !p.send(ctx, pulled{err: err}) {
			return
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, lastPause)
	}
}

func (p *puller) send(ctx context.Context, m pulled) bool {
	select {
	case p.out <- m:
		return true
	case <-ctx.Done():
		return false
	}
}

// stream reads until the stream ends; after is kept at what was handed over.
func (p *puller) stream(ctx context.Context, l *Log, after *uint64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	agent, err := l.config.Agents.Agent(ctx, p.target.node)
	if err != nil {
		return err
	}
	stream, err := agent.WatchEvents(ctx, &nodev1.WatchEventsRequest{
		SessionId: p.target.session, Generation: int64(p.target.generation), After: *after,
	})
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		m := pulled{position: resp.GetPosition(), events: resp.GetEvents().GetEvents()}
		if m.position == nil && len(m.events) == 0 {
			continue
		}
		if !p.send(ctx, m) {
			return ctx.Err()
		}
		if m.position != nil {
			*after = m.position.GetFirst() - 1
		}
		if n := len(m.events); n > 0 {
			*after = m.events[n-1].GetSequence()
		}
	}
}
