package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// pacing is how long things are tried; tests have their own.
type pacing struct {
	minPause, maxPause time.Duration // between two attempts
	giveUp             time.Duration // without a single message
	silence            time.Duration // a stream without even a heartbeat is dead
	poll               time.Duration
}

var defaultPacing = pacing{
	minPause: 250 * time.Millisecond, maxPause: 5 * time.Second,
	giveUp: 2 * time.Minute, silence: 90 * time.Second, poll: time.Second,
}

// errStop, returned by a follower's callback, ends it without an error.
var errStop = errors.New("stop")

var errSilent = status.Error(codes.Unavailable, "the stream went silent")

// follow calls fn for every event of a session until the stream's end event
// (also given to fn), an error of fn, or ctx ends. When the connection breaks it
// goes on behind the last event, and tells lost (which may be nil) once per
// break. The first connection is not tried again.
func (c *client) follow(ctx context.Context, name, after string, fn func(*cloudcodev1.SessionEvent) error, lost func(error)) error {
	connected, broken := false, false
	pause, lastHeard := c.pace.minPause, time.Now()
	for {
		err := c.followOnce(ctx, name, after, func(ev *cloudcodev1.SessionEvent) error {
			connected, broken, pause, lastHeard = true, false, c.pace.minPause, time.Now()
			if id := ev.GetId(); id != "" {
				after = id
			}
			return fn(ev)
		})
		switch {
		case err == nil || errors.Is(err, errStop):
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !connected || !transient(err):
			return err
		case time.Since(lastHeard) > c.pace.giveUp:
			return fmt.Errorf("gave up after %s: %w", c.pace.giveUp, err)
		}
		if !broken && lost != nil {
			lost(err)
		}
		broken = true
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		pause = min(2*pause, c.pace.maxPause)
	}
}

// followOnce returns nil after an end event.
func (c *client) followOnce(ctx context.Context, name, after string, fn func(*cloudcodev1.SessionEvent) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(c.pace.silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	stream, err := c.sessions.WatchSessionEvents(ctx, &cloudcodev1.WatchSessionEventsRequest{Name: name, After: after})
	for err == nil {
		var ev *cloudcodev1.SessionEvent
		if ev, err = stream.Recv(); err != nil {
			break
		}
		watchdog.Reset(c.pace.silence)
		if err = fn(ev); err != nil {
			return err
		}
		if ev.GetEnd() != nil {
			return nil
		}
	}
	if cause := context.Cause(ctx); errors.Is(cause, errSilent) {
		return cause
	}
	return err
}

// transient reports whether a stream that broke with err can be opened again.
func transient(err error) bool {
	if errors.Is(err, io.EOF) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Internal, codes.Aborted:
		return true
	}
	return false
}

// sleep waits about d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d/2 + rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// observe calls see with the session whenever it has changed, until see says
// done or returns an error, or ctx ends; see gets nil once the session is gone.
// Changes come by the event stream, and by asking now and then: that shows the
// progress of downloads, and goes on where streams do not pass. tick, if not
// nil, is called every 100 ms, never at the same time as see.
func (c *client) observe(ctx context.Context, first *cloudcodev1.Session, see func(*cloudcodev1.Session) (bool, error), tick func()) error {
	ctx, cancel := context.WithCancel(ctx)
	seen := make(chan *cloudcodev1.Session)
	followed := make(chan struct{})
	defer func() { cancel(); <-followed }()
	go func() {
		defer close(followed)
		// An error does not matter: asking finds out the same.
		_ = c.follow(ctx, first.GetName(), "", func(ev *cloudcodev1.SessionEvent) error {
			if s := ev.GetLifecycle().GetSession(); s != nil {
				select {
				case seen <- s:
				case <-ctx.Done():
					return errStop
				}
			}
			return nil
		}, nil)
	}()

	poll := time.NewTicker(c.pace.poll)
	defer poll.Stop()
	var ticks <-chan time.Time
	if tick != nil {
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		ticks = ticker.C
	}

	last, lastHeard := first, time.Now()
	if done, err := see(first); done || err != nil {
		return err
	}
	for {
		var s *cloudcodev1.Session
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticks:
			tick()
			continue
		case s = <-seen:
		case <-poll.C:
			var err error
			rctx, done := c.request(ctx)
			s, err = c.sessions.GetSession(rctx, &cloudcodev1.GetSessionRequest{Name: first.GetName()})
			done()
			switch {
			case status.Code(err) == codes.NotFound:
				s = nil
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case err != nil && (transient(err) || status.Code(err) == codes.DeadlineExceeded) && time.Since(lastHeard) < c.pace.giveUp:
				continue // the server is being restarted
			case err != nil:
				return err
			}
		}
		lastHeard = time.Now()
		if s != nil && s.GetUid() != first.GetUid() {
			s = nil // gone, and another one has the name
		}
		if s != nil {
			// Stream and answers overtake each other: never go back.
			if s.GetUpdateTime().AsTime().Before(last.GetUpdateTime().AsTime()) {
				continue
			}
			last = s
		}
		if done, err := see(s); done || err != nil {
			return err
		}
	}
}
