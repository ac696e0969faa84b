package cli

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

type (
	eventStream = grpc.ServerStreamingServer[cloudcodev1.SessionEvent]
	logStream   = grpc.ServerStreamingServer[cloudcodev1.LogEntry]
)

func at(offset time.Duration) *timestamppb.Timestamp { return timestamppb.New(testNow.Add(offset)) }

func lifecycle(id string, s *cloudcodev1.Session) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Id: id, Time: at(0), Event: &cloudcodev1.SessionEvent_Lifecycle{Lifecycle: &cloudcodev1.LifecycleEvent{Session: s}}}
}

func opencode(id, typ, frame string) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Id: id, Time: at(1500 * time.Millisecond), Event: &cloudcodev1.SessionEvent_Opencode{
		Opencode: &cloudcodev1.OpenCodeEvent{Type: typ, Directory: "/w", Frame: frame},
	}}
}

func heartbeat(id string) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Id: id, Event: &cloudcodev1.SessionEvent_Heartbeat{Heartbeat: &cloudcodev1.HeartbeatEvent{}}}
}

func end(reason string) *cloudcodev1.SessionEvent {
	return &cloudcodev1.SessionEvent{Time: at(2 * time.Second), Event: &cloudcodev1.SessionEvent_End{End: &cloudcodev1.EndEvent{Reason: reason}}}
}

func send(s eventStream, events ...*cloudcodev1.SessionEvent) error {
	for _, ev := range events {
		if err := s.Send(ev); err != nil {
			return err
		}
	}
	return nil
}

// aStart is how a session starts, step by step.
func aStart() []*cloudcodev1.Session {
	step := func(n int, state cloudcodev1.Session_State, phase, detail string, done, total int64) *cloudcodev1.Session {
		s := &cloudcodev1.Session{Name: "sessions/main", Uid: "uid-1", State: state, UpdateTime: at(time.Duration(n) * time.Second)}
		if state != cloudcodev1.Session_PENDING {
			s.Node = "nodes/n1"
		}
		if phase != "" {
			s.Progress = &cloudcodev1.StartProgress{Phase: phase, Detail: detail, CurrentBytes: done, TotalBytes: total}
		}
		return s
	}
	pending := step(1, cloudcodev1.Session_PENDING, "", "", 0, 0)
	pending.Reason, pending.Message = "NO_READY_NODE", "no node is ready"
	ready := step(9, cloudcodev1.Session_RUNNING, "", "", 0, 0)
	ready.WebUri = "http://main.localhost:8080"
	return []*cloudcodev1.Session{
		pending,
		step(2, cloudcodev1.Session_STARTING, "placed", "", 0, 0),
		step(3, cloudcodev1.Session_STARTING, "image", "pulling debian:12", 0, 0),
		step(4, cloudcodev1.Session_STARTING, "image", "pulling debian:12", 25<<20, 100<<20),
		step(5, cloudcodev1.Session_STARTING, "image", "unpacking debian:12", 100<<20, 100<<20),
		step(6, cloudcodev1.Session_STARTING, "container", "", 0, 0),
		step(7, cloudcodev1.Session_STARTING, "opencode", "waiting for its first answer", 0, 0),
		ready,
	}
}

func TestStartView(t *testing.T) {
	show := func(w *terminalOut, plainOut *lockedBuffer) {
		clock := testNow
		tick := func() time.Time { clock = clock.Add(250 * time.Millisecond); return clock }
		var v *startView
		if w != nil {
			v = newStartView(w, tick)
		} else {
			v = newStartView(plainOut, tick)
		}
		for _, s := range aStart() {
			v.show(s)
			v.tick()
		}
	}
	t.Run("plain", func(t *testing.T) {
		var out lockedBuffer
		show(nil, &out)
		golden(t, "progress.plain", out.String())
	})
	t.Run("terminal", func(t *testing.T) {
		t.Setenv("NO_COLOR", "1")
		out := &terminalOut{}
		show(out, nil)
		// One redraw per line, and what a person sees.
		golden(t, "progress.terminal", strings.ReplaceAll(out.String(), "\r\x1b[K", "⏎\n"))
		for line := range strings.SplitSeq(strings.ReplaceAll(out.String(), "\r\x1b[K", "\n"), "\n") {
			if len([]rune(line)) >= out.Width() {
				t.Errorf("line wraps: %q", line)
			}
		}
	})
}

type terminalOut struct{ lockedBuffer }

func (*terminalOut) Width() int { return 60 }

func TestCreateWaits(t *testing.T) {
	f := newFleet(t)
	steps := aStart()
	f.onCreate = func(*cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
		f.put(steps[0])
		return steps[0], nil
	}
	f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
		if err := s.Send(heartbeat("")); err != nil {
			return err
		}
		for i, step := range steps {
			f.put(step)
			if err := s.Send(lifecycle(fmt.Sprint("1-", i), step)); err != nil {
				return err
			}
		}
		<-s.Context().Done()
		return nil
	}
	r := f.run("session", "create", "main", "--wait")
	if want := "session main is ready\n  web:     http://main.localhost:8080\n  attach:  opencode attach http://localhost:8080/v1/sessions/main/proxy\n"; r.code != 0 || r.out != want {
		t.Fatalf("%+v", r)
	}
	if !strings.HasPrefix(r.err, "waiting for a node (NO_READY_NODE: no node is ready)\n") || !strings.HasSuffix(r.err, "ready after 0.0s\n") {
		t.Errorf("stderr %q", r.err)
	}
	r = f.run("session", "create", "main", "--wait", "-o", "json")
	if r.code != 0 || r.err != "" || !strings.Contains(r.out, `"state": "RUNNING"`) {
		t.Errorf("%+v", r)
	}
	t.Setenv("CLOUDCODE_WAIT", "true")
	if r = f.run("session", "create", "main", "--no-wait"); r.out != "session main created\n" {
		t.Errorf("%+v", r)
	}
}

// Where streams do not pass, asking now and then does.
func TestCreateWaitsWithoutEvents(t *testing.T) {
	f := newFleet(t)
	steps := aStart()
	f.onCreate = func(*cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
		f.put(steps[len(steps)-1])
		return steps[0], nil
	}
	if r := f.run("session", "create", "main", "--wait"); r.code != 0 || !strings.Contains(r.err, "placed on n1\nready after") {
		t.Errorf("%+v", r)
	}
}

func TestCreateWaitEnds(t *testing.T) {
	pending := aStart()[0]
	failed := proto.CloneOf(pending)
	failed.State, failed.Node, failed.Reason, failed.Message = cloudcodev1.Session_FAILED, "nodes/n1", "IMAGE_NOT_FOUND", "image nope:1 is not in its registry"
	failed.UpdateTime = at(time.Minute)
	for _, tc := range []struct {
		name  string
		next  *cloudcodev1.Session
		args  []string
		code  int
		wants []string
	}{
		{"failed", failed, nil, exitFailed, []string{"session main is FAILED: IMAGE_NOT_FOUND: image nope:1 is not in its registry", "cloudcode image import"}},
		{"timeout", pending, []string{"--timeout", "100ms"}, exitTimeout, []string{"is not ready after 100ms: PENDING, NO_READY_NODE: no node is ready", "cloudcode session get main"}},
		{"deleted", nil, nil, exitFailed, []string{"was deleted while it started"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFleet(t)
			f.onCreate = func(*cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
				if tc.next != nil {
					f.put(tc.next)
				}
				return pending, nil
			}
			r := f.run(append([]string{"session", "create", "main", "--wait"}, tc.args...)...)
			if r.code != tc.code || r.out != "" {
				t.Errorf("exit %d, %q", r.code, r.out)
			}
			for _, want := range tc.wants {
				if !strings.Contains(r.err, want) {
					t.Errorf("%q lacks %q", r.err, want)
				}
			}
		})
	}
}

func TestCreateWaitInterrupted(t *testing.T) {
	f := newFleet(t)
	ctx, cancel := context.WithCancel(t.Context())
	f.onCreate = func(*cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
		f.put(aStart()[0])
		return aStart()[0], nil
	}
	f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
		cancel()
		<-s.Context().Done()
		return nil
	}
	r := f.runWith(invocation{ctx: ctx}, "session", "create", "main", "--wait")
	if r.code != exitInterrupted || !strings.Contains(r.err, "goes on starting") {
		t.Errorf("%+v", r)
	}
}

func someEvents() []*cloudcodev1.SessionEvent {
	return []*cloudcodev1.SessionEvent{
		heartbeat(""),
		lifecycle("3-1", running("main")),
		opencode("3-2", "session.status", `{"directory":"/w","payload":{"type":"session.status","properties":{"sessionID":"ses_1","status":{"type":"busy"}}}}`),
		opencode("3-3", "message.part.updated", `{"payload":{"type":"message.part.updated","properties":{"part":{"sessionID":"ses_1","type":"tool","tool":"bash","state":{"status":"running","title":"List files"}}}}}`),
		opencode("3-4", "message.part.updated", `{"payload":{"properties":{"part":{"sessionID":"ses_1","type":"text","text":"Hello\n\u001b[31mworld"}}}}`),
		opencode("3-5", "message.updated", `{"payload":{"properties":{"info":{"id":"msg_1","sessionID":"ses_1","role":"assistant","modelID":"m"}}}}`),
		opencode("3-6", "session.updated", `{"payload":{"properties":{"info":{"id":"ses_1","title":"A chat"}}}}`),
		opencode("3-7", "message.part.delta", `{"payload":{"properties":{"sessionID":"ses_1","field":"text","delta":"lo"}}}`),
		opencode("3-8", "session.error", `{"payload":{"properties":{"sessionID":"ses_1","error":{"name":"ProviderAuthError","data":{"message":"no key"}}}}}`),
		opencode("3-9", "brand.new", `{"payload":{"properties":{"something":[1,2]}}}`),
		opencode("3-10", "broken", `not json`),
		{Id: "3-20", Time: at(0), Event: &cloudcodev1.SessionEvent_Gap{Gap: &cloudcodev1.GapEvent{Message: "9 events are no longer held"}}},
		end("DELETED"),
	}
}

func TestEvents(t *testing.T) {
	f := newFleet(t)
	f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error { return send(s, someEvents()...) }
	for name, args := range map[string][]string{
		"events.table":     nil,
		"events.json":      {"-o", "json"},
		"events.message":   {"--type", "message.*,end"},
		"events.lifecycle": {"--type", "lifecycle"},
	} {
		t.Run(name, func(t *testing.T) {
			r := f.run(append([]string{"session", "events", "main"}, args...)...)
			if r.code != 0 || r.err != "" || strings.Contains(r.out, "\x1b") {
				t.Fatalf("%+v", r)
			}
			golden(t, name, r.out)
		})
	}
}

func TestEventsGoOnAfterARestart(t *testing.T) {
	f := newFleet(t)
	printed := &notifyingBuffer{wrote: make(chan struct{})}
	f.onWatch = func(req *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
		if req.GetAfter() == "2-9" {
			if err := send(s, heartbeat("2-9"), lifecycle("3-1", running("main"))); err != nil {
				return err
			}
			<-s.Context().Done() // until the server is killed
			return nil
		}
		return send(s, heartbeat(req.GetAfter()), lifecycle("3-2", running("main")), end("DELETED"))
	}
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		<-printed.wrote // what the client has not seen cannot be resumed behind
		f.stop()
		f.start(f.address)
	}()
	r := f.runWith(invocation{out: printed}, "session", "events", "main", "--after", "2-9", "-o", "json")
	<-restarted
	if r.code != 0 || strings.Count(r.out, "\n") != 3 || !strings.Contains(r.err, "connection lost") || strings.Count(r.err, "\n") != 1 {
		t.Fatalf("%+v", r)
	}
	if len(f.after) != 2 || f.after[1] != "3-1" {
		t.Errorf("resumed after %q", f.after)
	}
}

// notifyingBuffer closes wrote at the first output.
type notifyingBuffer struct {
	lockedBuffer
	once  sync.Once
	wrote chan struct{}
}

func (b *notifyingBuffer) Write(p []byte) (int, error) {
	defer b.once.Do(func() { close(b.wrote) })
	return b.lockedBuffer.Write(p)
}

func TestEventsEnds(t *testing.T) {
	f := newFleet(t)
	t.Run("no session", func(t *testing.T) {
		f.onWatch = func(req *cloudcodev1.WatchSessionEventsRequest, _ eventStream) error {
			_, err := f.get(req.GetName())
			return err
		}
		if r := f.run("session", "events", "main"); r.code != exitNotFound || !strings.Contains(r.err, "no session main") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("no follow", func(t *testing.T) {
		f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
			if err := send(s, heartbeat(""), lifecycle("1-1", running("main")), heartbeat("1-1")); err != nil {
				return err
			}
			<-s.Context().Done()
			return nil
		}
		if r := f.run("session", "events", "main", "--follow=false"); r.code != 0 || strings.Count(r.out, "\n") != 1 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("silence", func(t *testing.T) {
		saved := defaultPacing
		defer func() { defaultPacing = saved }()
		defaultPacing.silence = time.Second // and a handshake must fit in
		calls := 0
		f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
			if calls++; calls == 2 {
				return send(s, end("DELETED"))
			}
			if err := s.Send(heartbeat("")); err != nil {
				return err
			}
			<-s.Context().Done()
			return nil
		}
		if r := f.run("session", "events", "main"); r.code != 0 || !strings.Contains(r.err, "went silent") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("interrupted", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
			cancel()
			<-s.Context().Done()
			return nil
		}
		if r := f.runWith(invocation{ctx: ctx}, "session", "events", "main"); r.code != exitInterrupted {
			t.Errorf("%+v", r)
		}
	})
	if r := f.run("session", "events", "main", "--type", "[a"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}

func TestLogs(t *testing.T) {
	f := newFleet(t)
	entry := func(ms int, stream, line string) *cloudcodev1.LogEntry {
		return &cloudcodev1.LogEntry{Time: at(time.Duration(ms) * time.Millisecond), Stream: stream, Line: line}
	}
	var all []*cloudcodev1.LogEntry
	for i, line := range []string{"one", "two", "twice", "twice", "five", "six"} {
		ms := i
		if line == "twice" {
			ms = 2 // two lines of one moment
		}
		all = append(all, entry(ms, "stdout", line))
	}
	var asked []*cloudcodev1.ReadSessionLogsRequest
	f.onLogs = func(req *cloudcodev1.ReadSessionLogsRequest, s logStream) error {
		asked = append(asked, proto.CloneOf(req))
		upTo, from := len(all), 0
		if n := int(req.GetTailLines()); n > 0 {
			from = max(0, len(all)-n)
		}
		if req.GetFollow() && len(asked) == 1 {
			upTo = 3 // and then the server dies
		}
		for _, e := range all[from:upTo] {
			if err := s.Send(e); err != nil {
				return err
			}
		}
		if upTo < len(all) {
			return status.Error(codes.Unavailable, "the server is being restarted")
		}
		return nil
	}
	if r := f.run("session", "logs", "main", "-f"); r.code != 0 || r.out != "one\ntwo\ntwice\ntwice\nfive\nsix\n" || !strings.Contains(r.err, "connection lost") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "logs", "main", "--tail", "2", "--timestamps"); r.out != "2026-11-23T12:00:00.004Z five\n2026-11-23T12:00:00.005Z six\n" {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "logs", "main", "--tail", "1", "-o", "json"); r.out != `{"time":"2026-11-23T12:00:00.005Z","stream":"stdout","line":"six"}`+"\n" {
		t.Errorf("%+v", r)
	}
	f.onLogs = func(*cloudcodev1.ReadSessionLogsRequest, logStream) error {
		return grpcerr.New(codes.FailedPrecondition, "NOT_PLACED", "the session is on no node yet")
	}
	if r := f.run("session", "logs", "main", "-f"); r.code != exitConflict {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "logs", "main", "--tail", "-1"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}
