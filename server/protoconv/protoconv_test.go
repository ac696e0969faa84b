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
		Storage:      fleet.Storage{Mode: fleet.ModeLocal},
	}
	full(t, spec)
	spec.Storage = fleet.Storage{} // see TestStorage
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

func TestStorage(t *testing.T) {
	own := &fleet.S3{
		Endpoint: "e", Bucket: "b", AccessKeyID: "k", SecretAccessKey: "hunter2", Region: "r", PathStyle: true, Prefix: "p", TigrisFSArgs: "a",
	}
	full(t, *own)
	st := fleet.Storage{Mode: fleet.ModeMount, Prefix: "x", Endpoint: "e", Bucket: "b", Root: "p", S3: own}
	shown := Storage(st)
	if text := protojson.Format(shown); strings.Contains(text, "hunter2") || shown.GetS3().GetAccessKeyId() != "k" {
		t.Errorf("shown: %s", text)
	}
	shown.S3.SecretAccessKey = "hunter2"
	if got := S3FromProto(shown.GetS3()); *got != *own {
		t.Errorf("s3: %+v", got)
	}
	if r := StorageRequestFromProto(shown); r.Mode != fleet.ModeMount || r.Profile != "" || r.Prefix == nil || *r.Prefix != "x" || *r.S3 != *own {
		t.Errorf("request: %+v", r)
	}
	if r := StorageRequestFromProto(nil); r != (StorageRequest{}) {
		t.Errorf("request of nothing: %+v", r)
	}
	if r := StorageRequestFromProto(&cloudcodev1.Storage{Prefix: new(string)}); r.Prefix == nil || *r.Prefix != "" || r.Mode != "" {
		t.Errorf("empty prefix: %+v", r)
	}
	if Storage(fleet.Storage{}) != nil {
		t.Error("a session of before has storage")
	}

	now := time.Date(2026, 11, 24, 1, 2, 3, 0, time.UTC)
	c := &fleet.Checkpoint{
		ID: "i", Time: now, Trigger: "turn", Files: 1, Bytes: 2, UploadedBytes: 3, OpenCodeVersion: "4", Generation: 5, Node: "n", Notes: []string{"x"},
	}
	full(t, *c)
	if got := CheckpointFromProto(Checkpoint(c)); !reflect.DeepEqual(got, c) || Checkpoint(c).GetNode() != "nodes/n" {
		t.Errorf("checkpoint: %+v", got)
	}
	status := &fleet.StorageStatus{Checkpoint: c, UnsavedSince: now, Message: "m", MountState: fleet.MountFailed, Mounter: "rclone"}
	full(t, *status)
	s := &fleet.Session{Spec: fleet.Spec{Storage: st}, Storage: status}
	out := StorageStatus(s)
	if out.GetMode() != cloudcodev1.Storage_MOUNT || !out.GetPersistent() || out.GetUri() != "s3://b/p/x" {
		t.Errorf("status: %v", out)
	}
	if got := StorageStatusFromProto(out); !reflect.DeepEqual(got, status) {
		t.Errorf("status: %+v", got)
	}
	if out := StorageStatus(&fleet.Session{}); out.GetMode() != cloudcodev1.Storage_LOCAL || out.GetPersistent() || out.GetUri() != "" {
		t.Errorf("local: %v", out)
	}
	for _, m := range []fleet.MountState{fleet.MountMounted, fleet.MountRemounting, fleet.MountFailed} {
		if got := StorageStatus(&fleet.Session{Storage: &fleet.StorageStatus{MountState: m}}).GetMountState(); got.String() != string(m) {
			t.Errorf("%s becomes %s", m, got)
		}
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
