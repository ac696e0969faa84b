package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

const (
	// firstWait is how long the headers wait for the server's first word, which
	// says at once whether there is such a session.
	firstWait = 5 * time.Second
	// flushSize is how many bytes of waiting events go out in one write.
	flushSize = 64 << 10
)

// serveEvents serves a session's events as Server-Sent Events:
//
//	id:    of the event, to be given as Last-Event-ID or ?after=
//	event: lifecycle, opencode, checkpointed, gap, heartbeat or end
//	data:  for opencode the frame of OpenCode, verbatim; for others the message
//	       of that name in the API, as JSON
//
// A connection to the server that breaks is made again with the last id; the
// client notices nothing but heartbeats.
func (g *Gateway) serveEvents(w http.ResponseWriter, r *http.Request, name string) {
	after := r.Header.Get("Last-Event-ID")
	if after == "" {
		after = r.URL.Query().Get("after")
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(g.draining, cancel)()

	src := &eventSource{g: g, name: name, after: after, out: make(chan frame, 64)}
	first, err := src.open(ctx)
	if err != nil {
		if ctx.Err() == nil {
			g.writeStatus(w, r, err)
		}
		return
	}

	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // nginx in front of us must not wait
	w.WriteHeader(http.StatusOK)
	sw := newStreamWriter(w, g.cfg.WriteTimeout)
	defer sw.done()

	ended := make(chan struct{})
	go func() {
		defer close(ended)
		src.run(ctx)
	}()
	defer func() { cancel(); <-ended }()

	buf := []byte("retry: 1000\n\n")
	if first != nil {
		buf = appendFrame(buf, *first)
	} else {
		buf = appendFrame(buf, heartbeat)
	}
	silence := time.NewTimer(g.cfg.Heartbeat)
	defer silence.Stop()
	for {
		if sw.write(buf) != nil {
			return
		}
		buf = buf[:0]
		silence.Reset(g.cfg.Heartbeat)
		select {
		case f, ok := <-src.out:
			if !ok {
				return
			}
			buf = appendFrame(buf, f)
		case <-silence.C:
			buf = appendFrame(buf, heartbeat)
			continue
		case <-ctx.Done():
			return
		}
		// What waits goes out together: under load one write carries many.
		for len(buf) < flushSize {
			select {
			case f, ok := <-src.out:
				if !ok {
					_ = sw.write(buf)
					return
				}
				buf = appendFrame(buf, f)
				continue
			default:
			}
			break
		}
	}
}

var heartbeat = frame{event: "heartbeat", data: []byte("{}")}

// eventSource reads a session's events from the server, over as many streams as
// it takes.
type eventSource struct {
	g      *Gateway
	name   string
	after  string // id of the last event
	out    chan frame
	stream chan recvd // of the stream that open began; nil if it could not
	ended  bool       // the end event was sent
}

type recvd struct {
	event *cloudcodev1.SessionEvent
	err   error
}

// open begins the stream and waits for its first event, so that errors can
// still be told as such. A server that cannot be reached is none if the session
// is known here: an EventSource that is refused never comes back. The frame is
// nil if there is none yet.
func (s *eventSource) open(ctx context.Context) (*frame, error) {
	s.stream = s.start(ctx, s.after)
	wait := time.NewTimer(firstWait)
	defer wait.Stop()
	select {
	case got := <-s.stream:
		if got.err == nil {
			f := s.take(got.event)
			return &f, nil
		}
		s.stream = nil
		if s.broken(got.err) {
			if rt, _, _ := s.g.routes.get(strings.TrimPrefix(s.name, "sessions/")); rt != nil {
				return nil, nil
			}
		}
		return nil, got.err
	case <-wait.C:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// start begins one stream. Its goroutine ends with ctx or the stream, and says
// why as the last thing.
func (s *eventSource) start(ctx context.Context, after string) chan recvd {
	ch := make(chan recvd)
	s.g.wg.Go(func() {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		send := func(r recvd) bool {
			select {
			case ch <- r:
				return true
			case <-ctx.Done():
				return false
			}
		}
		stream, err := s.g.sessions.WatchSessionEvents(ctx, &cloudcodev1.WatchSessionEventsRequest{Name: s.name, After: after})
		for err == nil {
			var e *cloudcodev1.SessionEvent
			if e, err = stream.Recv(); err == nil && !send(recvd{event: e}) {
				return
			}
		}
		send(recvd{err: err})
	})
	return ch
}

// run passes events on until the end event or ctx, and closes out.
func (s *eventSource) run(ctx context.Context) {
	defer close(s.out)
	for failures := 0; !s.ended; failures++ {
		if s.stream == nil {
			sleep(ctx, backoff(failures))
			s.stream = s.start(ctx, s.after)
		}
		for s.stream != nil && !s.ended {
			select {
			case got := <-s.stream:
				if got.err != nil {
					s.stream = nil
					s.onBreak(ctx, got.err)
					break
				}
				failures = 0
				if !s.put(ctx, s.take(got.event)) {
					return
				}
			case <-ctx.Done():
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// onBreak decides whether a stream that has broken is to be made again.
func (s *eventSource) onBreak(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil:
	case s.broken(err):
		s.g.log.DebugContext(ctx, "event stream broke, making it again", "session", s.name, "after", s.after, "error", err)
	case status.Code(err) == codes.NotFound:
		// Deleted while the server was away.
		s.finish(ctx, "DELETED")
	case (status.Code(err) == codes.InvalidArgument || status.Code(err) == codes.OutOfRange) && s.after != "":
		// The server no longer knows our place: say so and go on from now.
		s.after = ""
		s.put(ctx, frame{event: "gap", data: toJSON(&cloudcodev1.GapEvent{Message: "events are missing: " + status.Convert(err).Message()})})
	default:
		reason := grpcerr.Reason(err)
		if reason == "" {
			reason = "ERROR"
		}
		s.g.log.WarnContext(ctx, "event stream ended", "session", s.name, "error", err)
		s.finish(ctx, reason)
	}
}

func (s *eventSource) finish(ctx context.Context, reason string) {
	s.ended = true
	s.put(ctx, frame{event: "end", data: toJSON(&cloudcodev1.EndEvent{Reason: reason})})
}

// broken reports whether an error is of the way to the server, and passes.
func (s *eventSource) broken(err error) bool {
	if errors.Is(err, io.EOF) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded, codes.Internal, codes.Unknown, codes.Aborted, codes.ResourceExhausted:
		return true
	}
	return false
}

func (s *eventSource) put(ctx context.Context, f frame) bool {
	select {
	case s.out <- f:
		return true
	case <-ctx.Done():
		return false
	}
}

// take remembers an event's id and returns its frame.
func (s *eventSource) take(e *cloudcodev1.SessionEvent) frame {
	if e.GetId() != "" {
		s.after = e.GetId()
	}
	f := frame{id: e.GetId()}
	switch v := e.GetEvent().(type) {
	case *cloudcodev1.SessionEvent_Lifecycle:
		f.event, f.data = "lifecycle", toJSON(v.Lifecycle)
	case *cloudcodev1.SessionEvent_Opencode:
		f.event, f.data = "opencode", []byte(v.Opencode.GetFrame())
	case *cloudcodev1.SessionEvent_Checkpointed:
		f.event, f.data = "checkpointed", toJSON(v.Checkpointed)
	case *cloudcodev1.SessionEvent_Gap:
		f.event, f.data = "gap", toJSON(v.Gap)
	case *cloudcodev1.SessionEvent_End:
		f.event, f.data = "end", toJSON(v.End)
		s.ended = true
	default: // heartbeats, and what a newer server may send
		f.event, f.data = heartbeat.event, heartbeat.data
	}
	return f
}

func toJSON(m proto.Message) []byte {
	b, err := marshal.Marshal(m)
	if err != nil {
		return []byte("{}") // text that is no UTF-8, which the wire refuses already
	}
	return compact(b)
}
