package protoconv

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestSessionHidesThePassword(t *testing.T) {
	s := &fleet.Session{
		ID: "a", State: fleet.StateRunning, Revision: 7, Generation: 3,
		Assignment: &fleet.Assignment{Node: "n1", Generation: 3, Password: "hunter2"},
	}
	p := Session(s, "http://a.localhost")
	text := protojson.Format(p)
	if strings.Contains(text, "hunter2") {
		t.Fatalf("password shown: %s", text)
	}
	if p.GetName() != "sessions/a" || p.GetNode() != "nodes/n1" || p.GetState() != cloudcodev1.Session_RUNNING || p.GetGeneration() != 3 {
		t.Fatalf("wrong: %s", text)
	}
	before := p.GetEtag()
	s.Revision++
	if Etag(s) == before {
		t.Fatal("etag did not change with the revision")
	}
}

func TestEveryStateHasAName(t *testing.T) {
	for _, s := range fleet.States {
		if got := State(s); got == cloudcodev1.Session_STATE_UNSPECIFIED || got.String() != string(s) {
			t.Errorf("%s becomes %s", s, got)
		}
	}
	for _, s := range []fleet.NodeState{fleet.NodeReady, fleet.NodeNotReady} {
		if got := Node(&fleet.Node{State: s}, time.Time{}, 0).GetState(); got.String() != string(s) {
			t.Errorf("%s becomes %s", s, got)
		}
	}
}

func TestRoundTrips(t *testing.T) {
	spec := fleet.Spec{
		Image: "i", Env: map[string]string{"A": "b"}, OpenCodeConfig: "{}",
		Resources:    fleet.Resources{CPUMillis: 1, MemoryBytes: 2, PIDs: 3, DiskBytes: 4},
		NodeSelector: map[string]string{"z": "y"},
	}
	full(t, spec)
	if got := SpecFromProto(Spec(spec)); !reflect.DeepEqual(got, spec) {
		t.Errorf("spec: %+v", got)
	}
	info := fleet.NodeInfo{
		Version: "1", Hostname: "2", OS: "3", Architecture: "4", KernelVersion: "5",
		ContainerRuntimeVersion: "6", CPUMillis: 7, MemoryBytes: 8, DiskBytes: 9,
	}
	full(t, info)
	if got := NodeInfoFromProto(NodeInfo(info)); got != info {
		t.Errorf("node info: %+v", got)
	}
	progress := &fleet.Progress{Phase: "a", Detail: "b", Current: 1, Total: 2}
	full(t, *progress)
	if got := ProgressFromProto(Progress(progress)); *got != *progress {
		t.Errorf("progress: %+v", got)
	}
}

// full fails when a field was added that the test does not set.
func full(t *testing.T, v any) {
	t.Helper()
	rv := reflect.ValueOf(v)
	for i := range rv.NumField() {
		if rv.Field(i).IsZero() {
			t.Errorf("%T.%s is not covered by the test", v, rv.Type().Field(i).Name)
		}
	}
}
