package gateway

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

type eventStream = grpc.ServerStreamingServer[cloudcodev1.SessionEvent]

func opencodeEvent(id, frame string) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Id: id, Event: &cloudcodev1.SessionEvent_Opencode{Opencode: &cloudcodev1.OpenCodeEvent{Type: "t", Frame: frame}}}
}

func beat(id string) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Id: id, Event: &cloudcodev1.SessionEvent_Heartbeat{Heartbeat: &cloudcodev1.HeartbeatEvent{}}}
}

func endEvent(id, reason string) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Id: id, Event: &cloudcodev1.SessionEvent_End{End: &cloudcodev1.EndEvent{Reason: reason}}}
}

// feed serves events from a channel, after a first heartbeat as the server does.
func feed(ch <-chan *cloudcodev1.SessionEvent) func(string, eventStream) error {
	return func(after string, s eventStream) error {
		if err := s.Send(beat(after)); err != nil {
			return err
		}
		for {
			select {
			case e := <-ch:
				if err := s.Send(e); err != nil {
					return err
				}
				if e.GetEnd() != nil {
					return nil
				}
			case <-s.Context().Done():
				return s.Context().Err()
			}
		}
	}
}

// nextFrame reads one event, leaving out heartbeats unless they are wanted.
func nextFrame(t *testing.T, body *bufio.Reader, heartbeats bool) frame {
	t.Helper()
	var text strings.Builder
	for {
		line, err := body.ReadString('\n')
		if err != nil {
			t.Fatalf("stream ended: %v after %q", err, text.String())
		}
		text.WriteString(line)
		if line != "\n" {
			continue
		}
		for _, f := range parseFrames(text.String()) {
			if f.event != "heartbeat" || heartbeats {
				return f
			}
		}
		text.Reset()
	}
}

func TestEvents(t *testing.T) {
	r := start(t, Config{})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	ch := make(chan *cloudcodev1.SessionEvent)
	r.server.events = feed(ch)
	resp, body := r.stream(r.url("", "/v1/sessions/main/events"), "Last-Event-ID", "1-7", "Accept", "text/event-stream, */*;q=0.1")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("X-Accel-Buffering") != "no" {
		t.Fatalf("%v %v", resp.Status, resp.Header)
	}
	if line, _ := body.ReadString('\n'); line != "retry: 1000\n" {
		t.Errorf("first line %q", line)
	}
	if f := nextFrame(t, body, true); f.event != "heartbeat" || f.id != "1-7" {
		t.Errorf("first event %+v", f)
	}
	ch <- opencodeEvent("1-8", `{"payload": {"type":"x"}}`)
	if f := nextFrame(t, body, true); f.event != "opencode" || f.id != "1-8" || string(f.data) != `{"payload": {"type":"x"}}` {
		t.Errorf("%+v", f)
	}
	ch <- &cloudcodev1.SessionEvent{Id: "1-9", Event: &cloudcodev1.SessionEvent_Lifecycle{Lifecycle: &cloudcodev1.LifecycleEvent{
		Session: &cloudcodev1.Session{Name: "sessions/main", State: cloudcodev1.Session_RUNNING, Message: "a\nb"},
	}}}
	if f := nextFrame(t, body, true); f.event != "lifecycle" || !strings.Contains(string(f.data), `"state":"RUNNING"`) || !strings.Contains(string(f.data), `a\nb`) {
		t.Errorf("%+v", f)
	}
	ch <- &cloudcodev1.SessionEvent{Id: "1-10", Event: &cloudcodev1.SessionEvent_Gap{Gap: &cloudcodev1.GapEvent{Message: "lost"}}}
	if f := nextFrame(t, body, true); f.event != "gap" || string(f.data) != `{"message":"lost"}` {
		t.Errorf("%+v", f)
	}
	ch <- endEvent("1-11", "DELETED")
	if f := nextFrame(t, body, true); f.event != "end" || string(f.data) != `{"reason":"DELETED"}` {
		t.Errorf("%+v", f)
	}
	if rest, err := io.ReadAll(body); err != nil || len(rest) != 0 {
		t.Errorf("after the end: %q %v", rest, err)
	}
	if got := r.server.watched; len(got) != 1 || got[0] != "1-7" {
		t.Errorf("the server was asked %q", got)
	}
	_, body = r.stream(r.url("", "/v1/sessions/main/events?after=1-3"))
	if f := nextFrame(t, body, true); f.id != "1-3" {
		t.Errorf("?after= is not passed on: %+v", f)
	}
}

func TestEventErrorsBeforeTheFirstByte(t *testing.T) {
	r := start(t, Config{})
	a := r.get(r.url("", "/v1/sessions/nobody/events"))
	if a.code != 404 || a.h.Get("Content-Type") != "application/json" || !strings.Contains(a.body, "SESSION_NOT_FOUND") {
		t.Errorf("%d %v %s", a.code, a.h, a.body)
	}
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	r.server.events = func(string, eventStream) error {
		return grpcerr.New(codes.InvalidArgument, "BAD_EVENT_ID", "no event id")
	}
	if a := r.get(r.url("", "/v1/sessions/main/events?after=x")); a.code != 400 || !strings.Contains(a.body, "BAD_EVENT_ID") {
		t.Errorf("%d %s", a.code, a.body)
	}
	r.server.stop()
	if a := r.get(r.url("", "/v1/sessions/nobody/events")); a.code != 503 || a.h.Get("Retry-After") == "" {
		t.Errorf("%d %s", a.code, a.body)
	}
	r.server.start(t)
}

// The server is killed under a stream, and comes back: the reader goes on with
// the next event, and sees heartbeats meanwhile.
func TestEventsSurviveTheServer(t *testing.T) {
	r := start(t, Config{Heartbeat: 20 * time.Millisecond})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	ch := make(chan *cloudcodev1.SessionEvent)
	r.server.events = feed(ch)
	_, body := r.stream(r.url("", "/v1/sessions/main/events"))
	ch <- opencodeEvent("1-1", "{}")
	if f := nextFrame(t, body, false); f.id != "1-1" {
		t.Fatalf("%+v", f)
	}
	r.server.stop()
	for range 3 {
		if f := nextFrame(t, body, true); f.event != "heartbeat" {
			t.Fatalf("%+v", f)
		}
	}
	// Who comes now is not turned away: an EventSource would not try again.
	resp, late := r.stream(r.url("", "/v1/sessions/main/events"), "Last-Event-ID", "1-0")
	if resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	if f := nextFrame(t, late, true); f.event != "heartbeat" {
		t.Fatalf("%+v", f)
	}
	r.server.events = func(after string, s eventStream) error {
		_ = s.Send(opencodeEvent("1-2", "{}"))
		return feed(nil)(after, s)
	}
	r.server.start(t)
	for _, b := range []*bufio.Reader{body, late} {
		if f := nextFrame(t, b, false); f.id != "1-2" {
			t.Errorf("%+v", f)
		}
	}
	r.server.mu.Lock()
	asked := strings.Join(r.server.watched, " ")
	r.server.mu.Unlock()
	if !strings.Contains(asked, "1-1") || !strings.Contains(asked, "1-0") {
		t.Errorf("the server was asked for events after %q", asked)
	}
}

func TestEventsAfterARestartThatForgot(t *testing.T) {
	r := start(t, Config{Heartbeat: bound})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	var calls atomic.Int32
	r.server.events = func(after string, s eventStream) error {
		switch calls.Add(1) {
		case 1:
			_ = s.Send(opencodeEvent("1-1", "{}"))
			return grpcerr.New(codes.Unavailable, "STOPPING", "stopping")
		case 2:
			return grpcerr.New(codes.InvalidArgument, "BAD_EVENT_ID", "unknown id %s", after)
		case 3:
			if after != "" {
				return grpcerr.New(codes.InvalidArgument, "BAD_EVENT_ID", "again %s", after)
			}
			_ = s.Send(opencodeEvent("9-1", "{}"))
			return grpcerr.New(codes.Unavailable, "STOPPING", "stopping")
		default: // deleted meanwhile
			return notFound("main")
		}
	}
	_, body := r.stream(r.url("", "/v1/sessions/main/events"))
	var got []string
	for range 4 {
		f := nextFrame(t, body, false)
		got = append(got, f.event+" "+f.id)
		if f.event == "end" && string(f.data) != `{"reason":"DELETED"}` {
			t.Errorf("%s", f.data)
		}
	}
	if s := strings.Join(got, ","); s != "opencode 1-1,gap ,opencode 9-1,end " {
		t.Errorf("%s", s)
	}
}

// A reader that takes nothing is cut off after the write timeout, and holds up
// nobody meanwhile.
func TestSlowReader(t *testing.T) {
	r := start(t, Config{WriteTimeout: 200 * time.Millisecond})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	gone := make(chan struct{})
	big := fmt.Sprintf(`{"x":%q}`, strings.Repeat("x", 1<<20))
	var slow atomic.Bool
	slow.Store(true)
	r.server.events = func(_ string, s eventStream) error {
		first := slow.Swap(false)
		for i := 0; ; i++ {
			if !first && i == 3 {
				return s.Send(endEvent("e", "DELETED"))
			}
			if err := s.Send(opencodeEvent(fmt.Sprint("1-", i), big)); err != nil {
				if first {
					close(gone)
				}
				return err
			}
		}
	}
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", r.gw.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /v1/sessions/main/events HTTP/1.1\r\nHost: localhost\r\n\r\n") // and never reads
	eventually(t, "the slow reader's stream", func() bool { return !slow.Load() })
	_, body := r.stream(r.url("", "/v1/sessions/main/events"))
	for range 3 {
		if f := nextFrame(t, body, false); len(f.data) != len(big) {
			t.Errorf("%d bytes", len(f.data))
		}
	}
	select {
	case <-gone:
	case <-time.After(bound):
		t.Error("the slow reader is never cut off")
	}
}

func TestEventsEndWithTheGateway(t *testing.T) {
	r := start(t, Config{})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	r.server.events = feed(nil)
	_, body := r.stream(r.url("", "/v1/sessions/main/events"))
	nextFrame(t, body, true)
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	if err := r.gw.Stop(ctx); err != nil {
		t.Error(err)
	}
	rest, err := io.ReadAll(body)
	if err != nil || strings.Contains(string(rest), "event: end") {
		t.Errorf("the stream must end without saying that the session has: %q %v", rest, err)
	}
	if _, err := http.Get("http://" + r.gw.Addr() + "/healthz"); err == nil {
		t.Error("still listens")
	}
}
